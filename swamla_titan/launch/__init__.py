"""How the processes of a run start, find each other and stop.

run_train.sh runs preflight.py once, then scripts/torchrun.sh, which starts the elastic agent (agent.py: torchrun) of
this machine. Agents find each other at the rendezvous endpoint (endpoint.py, rendezvous.py) and start the workers, one
per GPU. A worker (worker.py) initializes the process group (process_group.py) and handles signals (signals.py).

torchrun restarts all workers whenever one of them ends with anything but 0, and so cannot pass on why a worker ended.
That goes through the launch folder, which scripts/torchrun.sh creates and names in SWAMLA_TITAN_LAUNCH_FOLDER:

    launcher       process id of scripts/torchrun.sh    written by torchrun.sh
    stop           name of the user's signal            torchrun.sh
    re-rendezvous  there while healthy workers are      agent
                   stopped for a change of machines
    N.pid          process id of local rank N           worker
    N.stopping     a signal of the user arrived         worker
    N.code         exit code for run_train.sh           worker

A worker's states; beside each arrow its cause, and in brackets what the worker writes:

        agent starts it
              |
              v       `stop` exists, one machine
          STARTING --------------------------------------------+
          [N.pid]                                              |
              | all ranks connected                            |
              v       user's signal [N.stopping]               v
          TRAINING ------------------------------------> STOPPING: saves ---> [N.code = 75], exit 0
              |
              +------ last step, or bad input ---------> [N.code = 0 or 2], exit 0
              |
              +------ SIGTERM while `re-rendezvous` ---> LEAVING: saves -----> exit 76, no N.code
              |       exists, or on another machine                               |
              |                                            agents meet again, STARTING with other ranks
              |
              +------ crash ---------------------------> exit 1, no N.code: the agent restarts all workers,
              |                                          MAX_RESTARTS times; then it ends
              +------ torchrun.sh has ended -----------> kills the agent, exit 1

A signal between STARTING and TRAINING is remembered, and acted on once all ranks are connected, because they would wait
for this one. When the agent has ended, torchrun.sh exits with 2 if any N.code is 2, else with 75 if any is 75, else
with 0 if all are 0, else with 1.
"""
