//! Who is who: this machine's identity, which servers it trusts, and which keys a server admits.

pub mod admission;
pub mod identity;
pub mod known_hosts;
pub mod peers;
pub mod trust;

pub use admission::{Admission, Anyone, Guests, Rights};
