//! Finding each other on a local network: multicast DNS (RFC 6762) with the number of the code, and nothing else about
//! whoever offers something.

use std::net::SocketAddr;
use std::time::Duration;

use aws_lc_rs::rand;
use mdns_sd::{ScopedIp, ServiceDaemon, ServiceEvent, ServiceInfo};
use tokio::time::timeout;

use crate::error::{Error, Result};

const SERVICE: &str = "_haul._udp.local.";
/// Time for whoever has a number to say so: answers are spread over 120 ms (RFC 6762, section 6).
const NUMBER_PROBE_TIMEOUT: Duration = Duration::from_millis(200);

/// A number that is announced until this is dropped.
pub struct Announcement {
    daemon: ServiceDaemon,
    name: String,
}

impl Announcement {
    /// Announces a number on all interfaces, as they come and go. Its host name is random: it says nothing of the machine.
    ///
    /// # Errors
    /// [`Error::Io`] when multicast DNS cannot be used here.
    pub fn of(number: u32, port: u16) -> Result<Self> {
        let mut random = [0; 8];
        rand::fill(&mut random)
            .map_err(|_| Error::Usage("the system gives no random numbers".into()))?;
        let host = format!("haul-{:016x}.local.", u64::from_le_bytes(random));
        let info = ServiceInfo::new(SERVICE, &number.to_string(), &host, "", port, None)
            .map_err(failed)?;
        let mut info = info.enable_addr_auto();
        // A name of another would be found out by the words; asking around first takes most of a second.
        info.set_requires_probe(false);
        let daemon = ServiceDaemon::new().map_err(failed)?;
        let name = info.get_fullname().to_owned();
        daemon.register(info).map_err(failed)?;
        Ok(Self { daemon, name })
    }
}

impl Drop for Announcement {
    fn drop(&mut self) {
        // Either fails only when its thread has gone already.
        let _ = self.daemon.unregister(&self.name);
        let _ = self.daemon.shutdown();
    }
}

/// Looks for whoever announces a number. The first answer counts, with all the addresses in it; none when there is no answer
/// in time.
///
/// # Errors
/// [`Error::Io`] when multicast DNS cannot be used here.
pub async fn find(number: u32, within: Duration) -> Result<Vec<SocketAddr>> {
    let daemon = Daemon(ServiceDaemon::new().map_err(failed)?);
    let events = daemon.0.browse(SERVICE).map_err(failed)?;
    let wanted = format!("{number}.{SERVICE}");
    let found = timeout(within, async {
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

/// Its thread ends with this, and not by itself.
struct Daemon(ServiceDaemon);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ = self.0.shutdown();
    }
}

/// Whether somebody on this network announces a number already, as far as that is told within 200 ms.
pub async fn is_taken(number: u32) -> bool {
    find(number, NUMBER_PROBE_TIMEOUT)
        .await
        .is_ok_and(|addresses| !addresses.is_empty())
}

/// An address that can be gone to; one of a single link on each interface that it was seen on.
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
    Error::io("multicast DNS cannot be used here")(std::io::Error::other(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number of nobody's code.
    const NUMBER: u32 = 4_000_000_017;

    #[tokio::test]
    async fn a_number_that_somebody_announces_is_taken() {
        let Ok(_announcement) = Announcement::of(NUMBER, 4433) else {
            return println!("skipped: no multicast DNS here");
        };
        // What is not found with patience cannot be found in a hurry.
        if find(NUMBER, Duration::from_secs(5))
            .await
            .is_ok_and(|found| found.is_empty())
        {
            return println!("skipped: multicast does not come back on this machine");
        }
        let mut taken = false;
        for _ in 0..10 {
            taken |= is_taken(NUMBER).await;
        }
        assert!(taken);
        assert!(!is_taken(NUMBER + 1).await);
    }
}
