//! From machine to machine by a short code. A sender offers content; a receiver proves that it knows the code, sees the
//! offer and accepts it. A pull follows, with the keys that the code has confirmed.

mod active_code;
pub mod code;
pub mod discovery;
mod introduction;
pub mod offer;
pub mod pair;
mod pake;
mod placement;
pub mod receive;
pub mod rendezvous;
pub mod route;
pub mod send;
pub mod ticket;

/// This machine's host name up to its first dot, without control characters and cut to 32 characters.
pub fn machine_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let name = name.split('.').next().unwrap_or_default();
    name.chars()
        .filter(|c| !c.is_control())
        .take(MAX_MACHINE_NAME)
        .collect()
}

/// Characters in a machine's name, at most. Each takes up to four bytes, and a message has room for 128.
const MAX_MACHINE_NAME: usize = 32;
