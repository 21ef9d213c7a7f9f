//! Runs blocking work, such as disk access, off the threads of the network.

use tokio::task::spawn_blocking;

use crate::error::{Code, Error, Reason, Result};

/// Work that panicked. It holds what could not be done, as a verb and its object.
pub(crate) struct Panicked(&'static str);

impl From<Panicked> for Error {
    fn from(Panicked(what): Panicked) -> Self {
        Self::Internal(what)
    }
}

impl From<Panicked> for Reason {
    fn from(panicked: Panicked) -> Self {
        Self::new(Code::Internal, Error::from(panicked).to_string())
    }
}

/// Runs work that blocks. A panic in it is logged and becomes an error. `what` names the work, as a verb and its object.
pub(crate) async fn blocking<T: Send + 'static, E: From<Panicked> + Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    match spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => {
            // Otherwise the runtime is shutting down.
            if error.is_panic() {
                tracing::error!(%error, "cannot {what}: a fault inside haul");
            }
            Err(Panicked(what).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_becomes_an_error_that_names_the_work() {
        let broken = |_: ()| -> Result<(), Error> { panic!("a test of panics") };
        let error = blocking("list", move || broken(())).await.unwrap_err();
        assert!(matches!(error, Error::Internal("list")), "{error}");
        let broken = |_: ()| -> Result<(), Reason> { panic!("a test of panics") };
        let reason = blocking("list", move || broken(())).await.unwrap_err();
        assert_eq!(reason.code, Code::Internal);
        assert_eq!(reason.to_string(), Error::Internal("list").to_string());
    }
}
