"""What several tests need: the oracle, comparisons by bits, builders of views and models."""
