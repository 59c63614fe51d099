"""AlpaServe's placement search and AlpaServe*, which keeps every model (Li et al., OSDI '23; MaverIQ, SC '25).

Read `problem`, `simulator`, then `search`. A search is a pure function of a problem, which holds
the expected demand.
"""
