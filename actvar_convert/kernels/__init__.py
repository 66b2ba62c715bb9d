"""Hot operations: an obvious reference and the fast paths beside it."""
