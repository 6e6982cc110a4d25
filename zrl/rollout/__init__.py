"""The iterators that yield batches of trajectory fragments: `same` collects in this very process."""
