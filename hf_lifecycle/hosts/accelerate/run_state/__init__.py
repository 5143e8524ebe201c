"""What a custom loop's program has beside what it prepared: plain values, and what it trains outside."""
