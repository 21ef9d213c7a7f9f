//! Discovery on the local network: multicast DNS (RFC 6762) announces the number of the code and nothing else about the
//! sender.

use std::net::SocketAddr;
use std::time::Duration;

use mdns_sd::{ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use tokio::time::timeout;

use crate::auth::random::random;
use crate::error::{Error, Result};

const SERVICE: &str = "_haul._udp.local.";
/// Time for another machine to answer for a number. Answers are spread over 120 ms (RFC 6762, section 6).
const NUMBER_PROBE_TIMEOUT: Duration = Duration::from_millis(200);

/// Announces a number until it is dropped.
pub struct Announcement {
    daemon: ServiceDaemon,
    name: String,
}

impl Announcement {
    /// Announces a number on all interfaces, also on those that appear later. The host name is random and reveals nothing about
    /// the machine.
    ///
    /// # Errors
    /// [`Error::Io`] when multicast DNS is not available; [`Error::NoRandomness`].
    pub fn of(number: u32, port: u16) -> Result<Self> {
        let host = format!("haul-{:016x}.local.", u64::from_le_bytes(random()?));
        let info = ServiceInfo::new(SERVICE, &number.to_string(), &host, "", port, None)
            .map_err(failed)?;
        let mut info = info.enable_addr_auto();
        // Probing for conflicts takes most of a second. The words detect a machine that has the same name.
        info.set_requires_probe(false);
        let daemon = ServiceDaemon::new().map_err(failed)?;
        let name = info.get_fullname().to_owned();
        daemon.register(info).map_err(failed)?;
        Ok(Self { daemon, name })
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // Both fail only when the daemon's thread has ended already.
        let _ = self.daemon.unregister(&self.name);
        let _ = self.daemon.shutdown();
    }
}

/// Finds the machine that announces a number. Returns all addresses of the first answer, or none when no answer comes within
/// `limit`.
///
/// # Errors
/// [`Error::Io`] when multicast DNS is not available.
pub async fn find(number: u32, limit: Duration) -> Result<Vec<SocketAddr>> {
    let daemon = Daemon(ServiceDaemon::new().map_err(failed)?);
    let events = daemon.0.browse(SERVICE).map_err(failed)?;
    let wanted = format!("{number}.{SERVICE}");
    let found = timeout(limit, async {
        while let Ok(event) = events.recv_async().await {
            if let ServiceEvent::ServiceResolved(service) = event
                && service.get_fullname() == wanted
            {
                let port = service.get_port();
                return service
                    .get_addresses()
                    .iter()
                    .flat_map(|ip| reachable(ip, port))
                    .collect();
            }
        }
        Vec::new()
    })
    .await;
    Ok(found.unwrap_or_default())
}

/// Ends the daemon's thread when dropped; it does not end by itself.
struct Daemon(ServiceDaemon);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only when the thread has ended already.
        let _ = self.0.shutdown();
    }
}

/// Whether a machine on this network announces a number already and answers within 200 ms.
pub async fn is_taken(number: u32) -> bool {
    find(number, NUMBER_PROBE_TIMEOUT)
        .await
        .is_ok_and(|addresses| !addresses.is_empty())
}

/// Socket addresses for an address from an answer. A link-local one gets the interface that it was seen on.
fn reachable(ip: &ScopedIp, port: u16) -> Vec<SocketAddr> {
    match ip {
        ScopedIp::V6(v6) if v6.addr().is_unicast_link_local() => {
            vec![SocketAddr::V6(std::net::SocketAddrV6::new(
                *v6.addr(),
                port,
                0,
                v6.scope_id().index,
            ))]
        }
        other => vec![SocketAddr::new(other.to_ip_addr(), port)],
    }
}

fn failed(error: mdns_sd::Error) -> Error {
    Error::io("cannot use multicast DNS")(std::io::Error::other(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number that no code has.
    const NUMBER: u32 = 4_000_000_017;

    #[tokio::test]
    async fn an_announced_number_is_taken() {
        let Ok(_announcement) = Announcement::of(NUMBER, 4433) else {
            return println!("skipped: no multicast DNS on this machine");
        };
        // Without an answer in 5 s, the short timeout of `is_taken` cannot work either.
        if find(NUMBER, Duration::from_secs(5))
            .await
            .is_ok_and(|found| found.is_empty())
        {
            return println!("skipped: this machine does not loop multicast back");
        }
        let mut taken = false;
        for _ in 0..10 {
            taken |= is_taken(NUMBER).await;
        }
        assert!(taken);
        assert!(!is_taken(NUMBER + 1).await);
    }
}
