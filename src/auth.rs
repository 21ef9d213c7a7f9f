//! Authentication and rights: this machine's identity, the servers it trusts, and the keys that a server admits.

pub mod admission;
pub mod home;
pub mod identity;
pub mod known_hosts;
pub mod peers;
pub(crate) mod random;
pub mod trust;

pub use admission::{Admission, Anyone, Guests, Rights};
