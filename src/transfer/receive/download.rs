//! Receives one transfer, from its `Want` to its receipt: a small file through memory, a large one directly to its
//! offsets.

mod exchange;
mod large;
mod pump;
mod small;

pub(super) use large::receive_large;
pub(super) use small::receive_small;
