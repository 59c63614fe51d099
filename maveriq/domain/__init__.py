"""The nouns of the system: models, GPUs, configurations, intents, requests, records.

Values are frozen, slotted, keyword-only dataclasses, checked at construction. Nothing here
knows a clock, a file format of others, or a policy.
"""
