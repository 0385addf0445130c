"""What several tests share: tiny models, made-up batches, fakes at the borders, and the conformance kits.

Modules are named for what they give. Three of them are also run as programs of their own, by their paths:
`answering_process`, `counting_engine` and the factories `scripted_engine` and `faulty_device`; these import no tests.
"""
