"""Checks of the engines on this machine (`maveriq engines check`), through the launcher and supervisor of real runs.

`plan` says which engines are started, `engines` runs them, `checks` lists what is checked on them, `runner` runs the
list with a limit on each step. `maveriq.report.engine_checks` shows the results.
"""
