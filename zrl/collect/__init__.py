"""How a fragment is made: the actor's contract, environments as columns, and the loop that drives both. No sockets."""
