//! From machine to machine by a short code: one offers, another shows that it knows the code, sees what there is, and takes
//! it. All that follows is a pull, with the keys that the code has confirmed.

pub mod code;
pub mod discovery;
pub mod offer;
pub mod pair;
mod pake;
pub mod receive;
pub mod rendezvous;
pub mod route;
pub mod send;
pub mod ticket;

/// What the system calls this machine, as far as its first dot.
pub fn machine_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let name = name.split('.').next().unwrap_or_default();
    name.chars()
        .filter(|c| !c.is_control())
        .take(MAX_NAME)
        .collect()
}

/// Most characters of it; each takes four bytes at most, and a message has room for 128.
const MAX_NAME: usize = 32;
