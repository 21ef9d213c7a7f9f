//! Reports once a minute what was left out of the log, and forgets peers that have gone.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tracing::info;

use super::rates::{LeftOut, Rates};
use super::state::ServerState;
use crate::net::share::Group;

/// How often the log says what it left out, and how long peers are remembered.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// Reports until it is dropped.
pub(super) async fn run(state: Arc<ServerState>) {
    loop {
        tokio::time::sleep(REPORT_INTERVAL).await;
        let rates = &state.limits.rates;
        report(rates);
        rates.forget();
    }
}

/// Reports what was left out since the last report.
pub(super) fn report(rates: &Rates) {
    for (from, count) in named(rates.refusals.take_left_out()) {
        info!(%from, count, "further refusals in the last minute");
    }
    for (from, count) in named(rates.log.take_left_out()) {
        info!(%from, count, "further connections and sessions that are not listed here");
    }
}

/// Names the peers of the counts.
fn named(left_out: LeftOut) -> Vec<(String, u64)> {
    let LeftOut { by_group, others } = left_out;
    let others = (others > 0).then(|| ("others".into(), others));
    let counts = by_group.into_iter();
    let named = counts.map(|(group, count)| (Name(group).to_string(), count));
    named.chain(others).collect()
}

/// A group as the log names it.
struct Name(Group);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Group::Key(key_id) => write!(f, "{key_id}"),
            Group::Network(ip) if ip.is_ipv6() => write!(f, "{ip}/64"),
            Group::Site(ip) if ip.is_ipv6() => write!(f, "{ip}/48"),
            Group::Network(ip) | Group::Site(ip) => write!(f, "{ip}"),
        }
    }
}
