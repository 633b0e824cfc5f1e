"""A tritonserver that is found, started, checked and kept up.

servers    find a tritonserver and what it can do
placement  which configuration, how many instances, threads of each
command    the hardened command line for the version found
process    one server process that leaves nothing behind: its output, its memory and open files
leftovers  what killed launchers left behind, removed
startup    all that is decided and checked before a start, and then to a server that passed its self-test
launcher   all of that in order, and again when it breaks: `running_server`
"""
