"""zrl beside its peers: the same work by every system, in turns, each measurement in a process of its own.

    make bench-peers ARGS="--works w1,w1l --systems plain,zrl,sb3-dummy --rounds 3 --seconds 5"

Reading order: `work` says what is done, `nets` and `learn` with which network and which update, `window` how it is
counted, `systems` who does it (one module each in ``systems/``), `measure` is the process of one measurement, `venvs`
prepares the peers' virtual environments, `run` goes round all of them, `report` makes table, keys and chart.

What is imported by `measure` runs in the environments of the peers, too: it needs NumPy, torch and Gymnasium, not zrl.
"""
