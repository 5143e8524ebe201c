"""Files that each rank writes a part of, as ``torch.distributed.checkpoint`` does: its plan learned, its bytes made."""
