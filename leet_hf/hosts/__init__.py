"""Forwards of base models whose own, in remote code, keep caches and masks of their own: one file a family.

Each stands on `leet_hf.host.prepare`; decoder layers, projections, norms and experts stay the host's own modules.
"""
