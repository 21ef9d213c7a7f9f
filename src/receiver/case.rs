//! Names that differ only in case, where the receiver's filesystem tells them not apart: the first stands, and every other
//! is refused before anything of it is written.

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use super::{Receiver, lock};
use crate::error::{Code, Result, Why};
use crate::path::RelativePath;

/// Names that a session remembers where case is folded (48 bytes each); past it collisions are no longer found.
const MAX_NAMES: usize = 1 << 20;

/// The names of a session, if case matters.
#[derive(Default)]
pub(super) struct Cases {
    folds: OnceLock<bool>,
    /// Digests of names as they are, by digests of what they are without case.
    names: Mutex<HashMap<Digest, Digest>>,
}

/// Half of BLAKE3: enough that no two names meet.
type Digest = [u8; 16];

impl Receiver {
    /// Refuses a name that would fall on another of this session.
    pub(super) fn check_case(&self, path: &RelativePath) -> Result<(), Why> {
        let folds = || {
            self.session
                .store
                .folds_case(self.session.place.directory())
        };
        if !*self.cases.folds.get_or_init(folds) {
            return Ok(());
        }
        let mut names = lock(&self.cases.names);
        let mut here = RelativePath::root();
        for component in path.components() {
            here.push(component)?;
            let (folded, name) = (digest(&fold(here.as_bytes())), digest(here.as_bytes()));
            match names.get(&folded) {
                Some(first) if *first != name => {
                    let text = "another name of this transfer differs from it only in case, which the filesystem there does \
                                not tell apart; rename one of them";
                    return Err(Why::new(Code::BadName, format!("{path}: {text}")));
                }
                None if names.len() < MAX_NAMES => drop(names.insert(folded, name)),
                _ => {}
            }
        }
        Ok(())
    }
}

/// A name without case, as near as can be told without knowing the filesystem's own table.
fn fold(name: &[u8]) -> Vec<u8> {
    match std::str::from_utf8(name) {
        Ok(text) => text.to_lowercase().into_bytes(),
        Err(_) => name.to_ascii_lowercase(),
    }
}

fn digest(name: &[u8]) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(&blake3::hash(name).as_bytes()[..16]);
    digest
}
