"""How the processes of a run start, find each other and stop.

run_train.sh runs preflight.py once, then scripts/torchrun.sh, which starts the elastic agent (agent.py: torchrun) of
this machine. Agents find each other at the rendezvous endpoint (endpoint.py, rendezvous.py) and start the workers, one
per GPU. A worker (worker.py) learns its rank (ranks.py), initializes the process group (process_group.py) and handles
signals (signals.py).

torchrun restarts all workers whenever one of them ends with anything but 0, and so cannot pass on why a worker ended.
That goes through the launch folder, which scripts/torchrun.sh creates and names in SWAMLA_TITAN_LAUNCH_FOLDER:

    launcher       process id of scripts/torchrun.sh    written by torchrun.sh
    stop           name of the user's signal            torchrun.sh
    re-rendezvous  there while healthy workers are      agent
                   stopped for a change of machines
    N.pid          process id of local rank N           worker
    N.stopping     a signal of the user arrived         worker
    N.code         exit code for run_train.sh           worker

A worker's states. Beside each arrow stands its cause; brackets hold what the worker writes into the folder.

        agent starts it
              |
              v
          STARTING ------ `stop` is there already -----------> nothing to save   [N.code = 75]     exit 0
           [N.pid]
              | all ranks are connected
              v
          TRAINING ------ user's signal [N.stopping] --------> STOPPING: saves   [N.code = 75]     exit 0
              |                                                    | second signal: SIGKILL
              |
              |---------- last step, or bad input ---------------------------->  [N.code = 0 or 2] exit 0
              |
              |---------- SIGTERM of an agent, with ---------> LEAVING: saves    [no N.code]       exit 76
              |           `re-rendezvous`, here or on another machine; the agents then form a
              |           new group and start its workers, whose ranks may differ
              |
              |---------- crash ---------------------------------------------->  [no N.code]       exit 1
              |           the agent restarts all workers, at most MAX_RESTARTS times
              |
              |---------- bad input that this rank alone finds --------------->  [N.code = 2]      exit 1
              |           (`report_bad_input`); the agent restarts nobody, because the input stays bad
              |
              |---------- torchrun.sh has ended -------------> kills the agent   [no N.code]       exit 1

With several machines a signal that arrives while STARTING is remembered, and all ranks stop together once they are
connected, because the others would wait for this one. Bad input and crashes end a worker that is STARTING likewise.

When the agent has ended, torchrun.sh exits with the first of these that holds: 128 + the signal's number after a second
signal; 2 if any N.code is 2; 75 if a signal came before any worker had started; if the agent exited with 0 or every
worker left 0 or 75, 75 if one is 75 and else 0; 1.
"""
