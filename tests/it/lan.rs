//! Two machines on one network, as two network namespaces on a bridge: they find each other by the code alone. Needs
//! root and `ip`; prints the reason and skips the tests where either is missing.

use std::path::Path;
use std::process::Command;

use crate::support::command::private;
use crate::support::netns::{Hosts, Running, done, or_skip};
use crate::support::{content, listing, write};
use tempfile::{TempDir, tempdir};

/// Two hosts, a and b, on one switch.
struct Lan(Hosts);

/// The addresses that an interface of each end gets.
#[derive(Clone, Copy, PartialEq)]
enum Addresses {
    /// IPv4, and the IPv6 address that each interface gives itself.
    Both,
    /// Only the latter.
    LinkLocal,
}

impl Lan {
    /// Returns `None`, with the reason printed, where namespaces cannot be made.
    fn new(addresses: Addresses) -> Option<Self> {
        or_skip(Self::build(addresses))
    }

    fn build(addresses: Addresses) -> Result<Self, String> {
        let hosts = Hosts::new(&["a", "b", "s"])?;
        hosts.switch("s")?;
        for (end, number) in [("a", 1), ("b", 2)] {
            hosts.plug((end, "eth0"), "s")?;
            if addresses == Addresses::Both {
                hosts.ip(end, &format!("addr add 10.77.0.{number}/24 dev eth0"))?;
            }
            hosts.ip(end, "link set eth0 up")?;
        }
        hosts.settle(&["a", "b"], "eth0")?;
        Ok(Self(hosts))
    }

    fn haul(&self, end: usize, home: &TempDir, from: &Path, arguments: &[&str]) -> Command {
        self.0.haul(["a", "b"][end], home, from, arguments)
    }
}

#[test]
fn two_machines_that_were_paired_need_no_code_and_no_address() {
    let Some(lan) = Lan::new(Addresses::Both) else {
        return;
    };
    let (alice, bob, source, to) = (private(), private(), tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("holiday/large"), &content(1, 1 << 20));
    let mut pairing = Running::start(lan.haul(0, &alice, source.path(), &["pair", "bob"]));
    let paired = done(lan.haul(1, &bob, to.path(), &["pair", "alice", &pairing.code()]));
    assert!(paired.starts_with("Paired: alice is SHA256:"), "{paired}");
    assert!(pairing.ends_well());
    let again = lan
        .haul(1, &bob, to.path(), &["pair", "alice", &pairing.code()])
        .output()
        .unwrap();
    assert_eq!(
        again.status.code(),
        Some(2),
        "a name is not given away in silence"
    );

    let mut sending = Running::start(lan.haul(
        0,
        &alice,
        source.path(),
        &["send", "--json", "--to", "bob", "holiday"],
    ));
    done(lan.haul(1, &bob, to.path(), &["receive", "--from", "alice", "--yes"]));
    assert!(sending.ends_well());
    assert_eq!(listing(to.path()), listing(source.path()));

    let inbox = tempdir().unwrap();
    let serving = Running::start(lan.haul(1, &bob, inbox.path(), &["serve"]));
    done(lan.haul(0, &alice, source.path(), &["cp", "holiday", "bob:"]));
    assert_eq!(
        done(lan.haul(0, &alice, source.path(), &["ls", "bob:holiday"])),
        "large\n"
    );
    done(lan.haul(
        0,
        &alice,
        source.path(),
        &["cp", "bob:holiday/large", "again"],
    ));
    assert!(std::fs::read(source.path().join("again")).unwrap() == content(1, 1 << 20));

    // A forgotten machine is refused. By address: without paired machines the server soon stops announcing itself.
    done(lan.haul(1, &bob, to.path(), &["peers", "--remove", "alice"]));
    let pin = done(lan.haul(1, &bob, to.path(), &["id"]));
    let refused = lan
        .haul(
            0,
            &alice,
            source.path(),
            &["ls", "--pin", pin.trim(), "haul://10.77.0.2/"],
        )
        .output()
        .unwrap();
    assert_eq!(
        refused.status.code(),
        Some(4),
        "{}",
        String::from_utf8_lossy(&refused.stderr)
    );
    drop(serving);
    let unknown = lan
        .haul(0, &alice, source.path(), &["cp", "holiday", "carol:"])
        .output()
        .unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("haul pair carol"));
}

#[test]
fn a_ticket_works_without_multicast_dns_and_for_a_pipe() {
    let Some(lan) = Lan::new(Addresses::Both) else {
        return;
    };
    let (alice, bob, source, to) = (private(), private(), tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("small"), b"small");
    // A ticket contains the port, so no search is needed.
    let mut sending =
        Running::start(lan.haul(0, &alice, source.path(), &["send", "--ticket", "small"]));
    let ticket = sending.first.clone();
    assert!(ticket.starts_with("HAUL:"), "{ticket}");
    write(&to.path().join("ticket"), ticket.as_bytes());
    let cut = lan
        .haul(
            1,
            &bob,
            to.path(),
            &["receive", &ticket[..ticket.len() - 9]],
        )
        .output()
        .unwrap();
    assert_eq!(cut.status.code(), Some(2), "and nothing is burnt by it");
    done(lan.haul(
        1,
        &bob,
        to.path(),
        &["receive", "--yes", "--ticket-file", "ticket"],
    ));
    assert!(sending.ends_well());
    assert_eq!(std::fs::read(to.path().join("small")).unwrap(), b"small");

    let mut command = lan.haul(0, &alice, source.path(), &["send", "-", "--name", "d.tar"]);
    command.stdin(std::fs::File::open(source.path().join("small")).unwrap());
    let mut sending = Running::start(command);
    assert_eq!(
        done(lan.haul(
            1,
            &bob,
            to.path(),
            &["receive", "--yes", "--to", "-", &sending.code()]
        )),
        "small"
    );
    assert!(sending.ends_well());
}

fn a_tree_goes_over(addresses: Addresses) {
    let Some(lan) = Lan::new(addresses) else {
        return;
    };
    let (alice, bob, source, to) = (private(), private(), tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("holiday/small"), b"small");
    write(&source.path().join("holiday/large"), &content(1, 3 << 20));
    let mut sending = Running::start(lan.haul(0, &alice, source.path(), &["send", "holiday"]));
    let received = lan
        .haul(1, &bob, to.path(), &["receive", "--yes", &sending.code()])
        .output()
        .unwrap();
    assert!(
        received.status.success(),
        "{}",
        String::from_utf8_lossy(&received.stderr)
    );
    assert!(sending.ends_well());
    assert_eq!(listing(to.path()), listing(source.path()));
}

#[test]
fn two_machines_on_one_network_find_each_other_by_the_code() {
    a_tree_goes_over(Addresses::Both);
}

#[test]
fn two_machines_find_each_other_by_link_local_addresses_alone() {
    a_tree_goes_over(Addresses::LinkLocal);
}

#[test]
fn an_absent_sender_is_reported_in_time() {
    let Some(lan) = Lan::new(Addresses::Both) else {
        return;
    };
    let (bob, to) = (private(), tempdir().unwrap());
    let received = lan
        .haul(
            1,
            &bob,
            to.path(),
            &["receive", "--yes", "417-maple-canyon-orbit"],
        )
        .output()
        .unwrap();
    assert_eq!(received.status.code(), Some(3));
    let said = String::from_utf8_lossy(&received.stderr);
    assert!(
        said.contains("no machine on this network offered 417"),
        "{said}"
    );
}
