"""maveriq: serve many LLMs on one GPU cluster by intent.

Start reading at docs/reading-guide.md. From Python: `maveriq.scenario` turns options into a
scenario, `maveriq.sim` runs it, `maveriq.report` measures and writes what happened.
"""

__version__ = "0.1.0"
