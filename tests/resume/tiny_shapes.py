"""The sizes that make any transformers configuration tiny.

Promise: a field of these names gets this size where it was larger; ``OVERRIDES`` holds what one architecture needs
besides. Not promised: that a field not named here is small (the bound on parameters catches that).
"""

from __future__ import annotations

from typing import Any

__all__ = ["NUMBERS", "OVERRIDES", "SEQUENCES", "TOKENS"]

_BY_SIZE: dict[int, str] = {
    1: "n_group num_nextn_predict_layers topk_group num_mtp_layers n_groups mamba_n_groups ssm_n_groups",
    2: """
        num_hidden_layers num_layers n_layer n_layers layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers depth num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk top_k_experts
        moe_k num_kv_heads n_head_kv vision_layers resampler_depth num_hidden_groups n_shared_experts
        max_window_layers temporal_patch_size num_blocks qformer_num_hidden_layers
        text_encoder_num_layers encoder_n_layers num_speaker_layers decoder_num_layers encoder_num_layers
        speech_decoder_postnet_layers linear_num_key_heads num_cross_attention_layers speech_encoder_layers
        text_encoder_layers text_decoder_layers num_adapter_layers num_single_layers
        t2u_encoder_layers t2u_decoder_layers
        aligner_num_add_layers prompt_num_layers predictor_num_hidden_layers pred_num_hidden_layers
        decoder_num_hidden_layers num_attention_groups num_stages_layers enc_n_layers dec_n_layers num_hash_layers
        num_zero_experts expert_ffn_layers memory_attention_num_layers global_layers local_layers
        xvector_output_layers num_global_layers num_local_layers vision_num_layers text_num_layers audio_num_layers
        encoder_num_hidden_layers n_encoder_layers n_decoder_layers swa_num_key_value_heads duration_predictor_flow_bins
        num_blocks_per_layer semantic_encoder_layers acoustic_layers
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts expert_num linear_num_value_heads
        mamba_n_heads mamba_num_heads vision_heads swa_num_attention_heads decoder_num_attention_heads
        resampler_n_heads resampler_heads index_n_heads mask_time_length mask_feature_length
        encoder_num_attention_heads qformer_num_attention_heads linear_num_heads num_encoder_attention_heads
        num_decoder_attention_heads num_cross_attention_heads pred_num_attention_heads encoder_n_heads
        speech_encoder_attention_heads text_encoder_attention_heads text_decoder_attention_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads num_query_tokens resampler_num_latents
        num_feature_levels_heads prompt_num_attention_heads num_codebooks_heads num_conv_pos_embedding_groups
        mm_tokens_per_image num_image_queries upsample_groups time_step_rank num_attention_heads_per_layer
    """,
    8: """
        patch_size head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim kv_lora_rank
        linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim resampler_head_dim
        resampler_dim_head state_size mamba_d_state mamba_head_dim mamba_d_head ssm_state_size rotary_dim
        global_head_dim swa_head_dim num_queries kernel_size_positions encoder_stride num_filters d_rel
        num_conv_pos_embeddings codebook_dim kv_channels key_head_dim value_head_dim
        lora_rank gate_low_rank_dim qk_head_dim xpath_unit_hidden_size num_latents pronunciation_embed_dim
        shape_embed_dim
    """,
    16: """
        q_lora_rank image_seq_length num_mel_bins mamba_chunk_size chunk_size index_topk memory_encoder_output_channels
        o_lora_rank num_labels_detection relative_attention_num_buckets text_lora_rank feat_dim
    """,
    32: """
        hidden_size n_embd d_model embed_dim embedding_size hidden_dim_model image_size projection_dim
        encoder_hidden_size decoder_hidden_size out_hidden_size emb_dim word_embed_proj_dim text_embed_dim
        vision_embed_dim d_inner_model embedding_dim pretrain_image_size input_size crop_size output_dim
        vision_hidden_size text_hidden_size audio_hidden_size cross_attention_hidden_size hidden_size_per_layer_input
        sliding_window window_attention hidden_size_global hidden_size_local dim_embedding embedding_hidden_size
        backbone_hidden_size attention_hidden_size fpn_hidden_size semantic_hidden_size acoustic_hidden_size
        patch_embed_hidden_size iou_head_hidden_dim decoder_model_dim encoder_model_dim pooler_output_size
        decoder_embed_dim encoder_embed_dim dim pred_hidden_size qformer_hidden_size conv_bias_size
        projector_hidden_size project_dim entity_emb_size memory_attention_hidden_size memory_encoder_hidden_size
        mask_downsampler_embed_dim memory_fuser_embed_dim encoder_hidden_dim upsample_initial_channel
        hidden_channels classifier_proj_size coordinate_size shape_size vision_output_dim adapter_out_dim
        query_pre_attn_scalar global_pointer_head_size block_sparse_size projection_size subsampling_conv_channels
        text_config_hidden_size vq_hidden vq_embed_dim base_channels mask_feature_size feature_size
        conv_dim_size tts_hidden_size thinker_hidden_size speaker_embed_dim speaker_embedding_dim llm_hidden_size
        dim_model bottleneck_features head_hidden_size fusion_hidden_size d_latents max_xpath_tag_unit_embeddings
        max_xpath_subs_unit_embeddings mask_dim convolution_dim
    """,
    64: """
        intermediate_size moe_intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim d_inner n_inner
        dim_feedforward encoder_intermediate_size decoder_intermediate_size hidden_dim ffn_hidden_size dim_ff
        shared_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        max_position_embeddings n_positions max_source_positions max_target_positions model_max_length
        vision_intermediate_size ff_dim feed_forward_dim expert_ffn_hidden_size intermediate_size_mlp
        codebook_size num_position_embeddings max_sequence_length max_length_positions context_length
        seq_length_positions encoder_feedforward_dim decoder_feedforward_dim qformer_intermediate_size
        feed_forward_hidden_size memory_attention_feed_forward_hidden_size memory_fuser_intermediate_dim
        speech_encoder_intermediate_size expert_hidden_size moe_ffn_hidden_size dense_intermediate_size
        shared_expert_ffn_dim mlp_hidden_size encoder_max_positions max_position max_seq_len_positions
        max_2d_position_embeddings rel_2d_pos_bins max_rel_2d_pos max_rel_pos_bins num_embeds num_embeddings
        speech_encoder_dim prefix_hidden conv_positions mamba_expand_size relative_attention_max_distance
        block_auto_dim max_source_positions_audio speech_decoder_postnet_units share_expert_dim
        mlp_intermediate_size text_encoder_ffn_dim t2u_encoder_ffn_dim t2u_decoder_ffn_dim frequency_embedding_size
    """,
    128: """
        vocab_size input_vocab_size output_vocab_size vocab_size_per_layer_input text_vocab_size audio_vocab_size
        t2u_vocab_size unit_hifi_gan_vocab_size n_vocab char_vocab_size decoder_vocab_size entity_vocab_size
        src_vocab_size tgt_vocab_size max_2d_positions encoder_vocab_size head_out_channels speech_vocab_size
        num_buckets encoder_hash_byte_group_vocab vocab_offset block_size pronunciation_vocab_size
        shape_vocab_size
    """,
}

NUMBERS: dict[str, int] = {name: size for size, names in _BY_SIZE.items() for name in names.split()}

SEQUENCES: dict[str, list[int]] = {
    "hidden_sizes": [16],
    "depths": [1],
    "decoder_depths": [1],
    "num_heads": [2],
    "num_attention_heads": [2],
    "embed_dims": [16],
    "embed_dim": [16],
    "neck_hidden_sizes": [16],
    "encoder_hidden_sizes": [16],
    "conv_dim": [32],
    "tdnn_dim": [32],
    "dim": [16],
    "stage_out_channels": [16],
    "stage_mid_channels": [8],
    "num_hidden_layers": [1],
    "tubelet_size": [2, 8, 8],
}

TOKENS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "sep_token_id": 2,
    "cls_token_id": 3,
    "mask_token_id": 4,
    "unk_token_id": 5,
    "image_token_id": 10,
    "image_token_index": 10,
    "audio_token_id": 11,
    "audio_token_index": 11,
    "video_token_id": 12,
    "video_token_index": 12,
}

_SMALL_RESNET: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 16, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
}
_LAST_STAGE = {**_SMALL_RESNET["backbone_config"], "out_features": ["stage4"]}
_FORECAST = {"prediction_length": 4, "context_length": 8}
_TWO_STAGES = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "encoder_stride": 8,
}
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_MAMBA_HEADS = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2}

# What one architecture needs besides, mostly where its fields have to agree with each other.
OVERRIDES: dict[str, dict[str, Any]] = {
    "autoformer": _FORECAST,
    "bamba": _MAMBA_HEADS,
    "bit": {"num_groups": 2, "embedding_size": 16},
    "conditional_detr": {**_SMALL_RESNET, "backbone_config": _LAST_STAGE},
    "dab-detr": {**_SMALL_RESNET, "backbone_config": _LAST_STAGE},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deformable_detr": _SMALL_RESNET,
    "detr": {**_SMALL_RESNET, "backbone_config": _LAST_STAGE},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "efficientnet": {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "falcon_h1": {**_MAMBA_HEADS, "mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": [64, 64]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA_HEADS,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "informer": _FORECAST,
    "jamba": {"use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "ministral": {"head_dim": 8},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "nemo_speechlm": {
        "audio_config": {
            "asr_config": {"num_key_value_heads": 4},
            "diarization_config": {"audio_config": {"num_key_value_heads": 4}},
        },
        "word_timestamp_config": {"num_key_value_heads": 4},
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "qwen2_5_vl_text": _THREE_AXES,
    "qwen2_vl_text": _THREE_AXES,
    "paddleocr_vl_text": _THREE_AXES,
    "qwen2_5_omni_text": _THREE_AXES,
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "swin": _TWO_STAGES,
    "swinv2": {**_TWO_STAGES, "pretrained_window_sizes": [0, 0]},
    "table-transformer": {**_SMALL_RESNET, "backbone_config": _LAST_STAGE},
    "time_series_transformer": _FORECAST,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 4},
}
