"""Python imports this module when it starts: in every process of the tests, as scripts/test puts its folder on the path.

Importing torch allocates a million objects that stay. Looking for garbage among them takes a sixth of a job's CPU time.
"""

import gc

gc.set_threshold(200_000, 20, 100)
