//! The limit of open files (RLIMIT_NOFILE), and how much of it haul uses.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors reserved for everything except transferred files: sockets, the runtime, the store, standard streams, and
/// those of an embedding program.
const RESERVED_DESCRIPTORS: u64 = 32;
/// The assumed limit if the system sets none.
const UNLIMITED: u64 = 1 << 20;
/// Descriptors that one transfer may briefly have open: the file and its directory.
const DESCRIPTORS_PER_TRANSFER: u64 = 2;

/// Raises the soft limit of open files to the hard limit. For `main` functions, because it changes the whole process.
/// Many systems start at 1,024. Returns the new limit.
pub fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Fails on systems whose hard limit is above what they really allow; then the soft limit stays.
    let _ = setrlimit(Resource::Nofile, raised);
    getrlimit(Resource::Nofile).current.unwrap_or(UNLIMITED)
}

/// Returns how many of `wanted` transfers may have files open at the same time; at least one.
pub(crate) fn limit_to_open_files(wanted: usize) -> usize {
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(UNLIMITED);
    let room = allowed.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS_PER_TRANSFER;
    wanted
        .min(usize::try_from(room).unwrap_or(usize::MAX))
        .max(1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn at_least_one_transfer_is_allowed() {
        assert_eq!(super::limit_to_open_files(0), 1);
        assert!(super::limit_to_open_files(usize::MAX) >= 1);
    }
}
