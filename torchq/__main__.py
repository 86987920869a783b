"""`python -m torchq` is the command `torchq`."""

from torchq.command_line import main

main()
