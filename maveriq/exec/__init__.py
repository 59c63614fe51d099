"""The executor: the same controller on real engines.

Nothing here yet. It will drive `maveriq.control.Controller` on a real clock, as `maveriq.sim`
does on a simulated one; docs/reading-guide.md says which parts both share.
"""
