"""AlpaServe's placement search and AlpaServe*, which keeps every model (Li et al., OSDI '23; MaverIQ, SC '25).

Read `problem`, `simulate`, `fill`, then `search`. Nothing here knows a clock or a screen: a search
is a pure function of a problem, which holds the demand that is expected.
"""
