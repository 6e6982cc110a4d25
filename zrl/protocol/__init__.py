"""Who may do what: the messages, and the state machines of slots and peers. Values in, values out.

Standard library only; no sockets, no clock: whatever depends on time takes `now`, seconds of a monotonic clock.
"""
