"""The iterators that yield batches of trajectory fragments.

`same` collects in this very process, `single` in one worker process, `multi` in several, `cluster` in those that
`zrl worker` brings. `evaluator` plays episodes beside them.
"""
