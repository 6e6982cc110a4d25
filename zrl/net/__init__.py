"""Bytes: messages to frames and back, and the sockets that carry them. Only here are zmq and msgpack imported."""
