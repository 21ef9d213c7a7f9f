//! A store in memory: the reference of the conformance tests.
