"""How the processes of a run start, find each other and stop: worker protocol, elastic agent, rendezvous, signals."""
