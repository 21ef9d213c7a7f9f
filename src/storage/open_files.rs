//! Open files: what the system allows, and what of it haul lets itself have.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors left to everything that is not a file being transferred: sockets, the runtime, the store, standard
/// streams, and what an embedding program has open.
const KEPT: u64 = 32;
/// Where the system sets no limit.
const PLENTY: u64 = 1 << 20;
/// Descriptors that one transfer may have open for a moment: the file, and the directory it stands in.
const EACH: u64 = 2;

/// Raises the soft limit of open files to the hard one, as a program that opens many files may; for `main` functions,
/// since it changes the whole process. Many systems begin at 1,024. Returns what is allowed now.
pub fn raise_open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Fails on systems whose hard limit is above what they really allow; the soft limit stays then.
    let _ = setrlimit(Resource::Nofile, raised);
    getrlimit(Resource::Nofile).current.unwrap_or(PLENTY)
}

/// How many of `wanted` transfers may have files open at the same time; at least one.
pub(crate) fn limit_to_open_files(wanted: usize) -> usize {
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(PLENTY);
    let room = allowed.saturating_sub(KEPT) / EACH;
    wanted
        .min(usize::try_from(room).unwrap_or(usize::MAX))
        .max(1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_always_room_for_one() {
        assert_eq!(super::limit_to_open_files(0), 1);
        assert!(super::limit_to_open_files(usize::MAX) >= 1);
    }
}
