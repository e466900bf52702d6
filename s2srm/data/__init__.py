"""From rows of a data set to token ids: adapters, loading, templates, examples and their order.

Rows are read and checked (`loading`), brought to one form (`adapters`, `schema`), written down as
token ids once (`templates`, `examples`) and visited in a reproducible order (`order`). Text is
never tokenised a second time: everything after `examples` works on ids.
"""
