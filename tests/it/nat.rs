//! Two machines on different networks and a relay, as hosts and routers in network namespaces: by which path they reach
//! each other, and what happens to a transfer when that path changes. Needs root, `ip` and `nft`; prints the reason and
//! skips the tests where one is missing.
//!
//! The routers are Linux's own. Masquerading keeps a port for all destinations, which punching needs, or draws another
//! for each (fully-random: a symmetric NAT). Only replies are let in.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::command::private;
use crate::support::netns::{Hosts, Running, done, or_skip};
use crate::support::{content, listing, write};
use haul::pairing::code::ShortCode;
use tempfile::{TempDir, tempdir};

/// The device in front of a host.
#[derive(Clone, Copy, PartialEq)]
enum Behind {
    /// Nothing: it has a public address.
    Nothing,
    /// A NAT that gives a socket one port for all destinations.
    Nat,
    /// The same, with the private addresses that many homes use; it rejects what it does not let in, as OpenWrt does.
    Home,
    /// A NAT that gives a socket another port for each destination.
    Symmetric,
    /// A firewall with public addresses, all of them IPv6.
    Firewall6,
}

/// Hosts a and b behind routers na and nb, and a relay on r, all on one switch.
struct Net {
    hosts: Hosts,
    ipv6: bool,
    homes: [TempDir; 3],
}

/// The addresses of the relay, and the outer addresses of a and b.
const RELAY: &str = "203.0.113.1";
const RELAY6: &str = "2001:db8:1::1";

const GUARD: &str = "
table inet guard {
  chain forwarded {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname \"lan\" accept
  }
  chain arriving {
    type filter hook input priority 0;
    iifname \"wan\" ct state new meta l4proto udp drop
  }
}
";

fn masquerade(how: &str) -> String {
    format!(
        "table ip nat {{\n chain out {{\n type nat hook postrouting priority 100;\n oifname \"wan\" masquerade {how}\n }}\n}}\n"
    )
}

impl Net {
    /// Returns `None`, with the reason printed, where namespaces cannot be made.
    fn new(a: Behind, b: Behind) -> Option<Self> {
        or_skip(Self::build(a, b))
    }

    fn build(a: Behind, b: Behind) -> Result<Self, String> {
        let net = Self {
            hosts: Hosts::new(&["s", "r", "na", "nb", "a", "b"])?,
            ipv6: a == Behind::Firewall6,
            homes: [private(), private(), private()],
        };
        net.hosts.switch("s")?;
        net.attach("r", "eth0", 1)?;
        for (host, router, number, behind) in [("a", "na", 11, a), ("b", "nb", 12, b)] {
            match behind {
                Behind::Nothing => net.attach(host, "eth0", number)?,
                _ => net.behind((host, router), number, behind)?,
            }
        }
        Ok(net)
    }

    /// Gives a host a public address.
    fn attach(&self, host: &str, device: &str, number: u8) -> Result<(), String> {
        self.hosts.plug((host, device), "s")?;
        let address = match self.ipv6 {
            true => format!("2001:db8:1::{number}/64"),
            false => format!("203.0.113.{number}/24"),
        };
        self.hosts.ip(
            host,
            &format!("addr add {address} dev {device}{}", self.at_once()),
        )?;
        self.hosts.ip(host, &format!("link set {device} up"))?;
        // The route to the networks behind the routers.
        if self.ipv6 {
            for other in [11, 12].iter().filter(|other| **other != number) {
                self.hosts.ip(
                    host,
                    &format!("-6 route add 2001:db8:{other}::/64 via 2001:db8:1::{other}"),
                )?;
            }
        }
        Ok(())
    }

    /// Puts a host behind a router.
    fn behind(
        &self,
        (host, router): (&str, &str),
        number: u8,
        behind: Behind,
    ) -> Result<(), String> {
        self.attach(router, "wan", number)?;
        self.hosts.wire((router, "lan"), (host, "eth0"))?;
        let (family, [inside, outside]) = match behind {
            _ if self.ipv6 => ("-6 ", [1, 2].map(|end| format!("2001:db8:{number}::{end}"))),
            Behind::Home => ("", [1, 2].map(|end| format!("192.168.1.{end}"))),
            _ => ("", [1, 2].map(|end| format!("10.0.{number}.{end}"))),
        };
        let bits = if self.ipv6 { 64 } else { 24 };
        self.hosts.ip(
            router,
            &format!("addr add {inside}/{bits} dev lan{}", self.at_once()),
        )?;
        self.hosts.ip(
            host,
            &format!("addr add {outside}/{bits} dev eth0{}", self.at_once()),
        )?;
        self.hosts.ip(router, "link set lan up")?;
        self.hosts.ip(host, "link set eth0 up")?;
        self.hosts
            .ip(host, &format!("{family}route add default via {inside}"))?;
        let forward = if self.ipv6 {
            "net/ipv6/conf/all/forwarding"
        } else {
            "net/ipv4/ip_forward"
        };
        self.hosts.set(router, forward, "1")?;
        let refused = if behind == Behind::Home {
            "udp reject"
        } else {
            "udp drop"
        };
        self.hosts
            .nft(router, &GUARD.replace("udp drop", refused))?;
        match behind {
            Behind::Nat | Behind::Home => self.hosts.nft(router, &masquerade("")),
            Behind::Symmetric => self.hosts.nft(router, &masquerade("fully-random")),
            Behind::Nothing | Behind::Firewall6 => Ok(()),
        }
    }

    /// Lets an IPv6 address be used without duplicate detection.
    fn at_once(&self) -> &'static str {
        if self.ipv6 { " nodad" } else { "" }
    }

    fn relay(&self) -> &'static str {
        if self.ipv6 { RELAY6 } else { RELAY }
    }

    /// Starts a relay.
    fn relaying(&self) -> Running {
        self.relaying_with(&[])
    }

    fn relaying_with(&self, arguments: &[&str]) -> Running {
        let at = if self.ipv6 {
            format!("[{RELAY6}]:4440")
        } else {
            format!("{RELAY}:4440")
        };
        let all = [&["relay", "--listen", &at], arguments].concat();
        let relaying =
            Running::start(
                self.hosts
                    .haul("r", &self.homes[2], self.homes[2].path(), &all),
            );
        assert!(
            relaying.first.starts_with("Relaying on"),
            "{}",
            relaying.first
        );
        relaying
    }

    /// Runs haul on host a or b, with the relay.
    fn haul(&self, end: usize, from: &Path, arguments: &[&str]) -> Command {
        let mut command = self
            .hosts
            .haul(["a", "b"][end], &self.homes[end], from, arguments);
        command.env("HAUL_RELAY", self.relay());
        command
    }
}

/// A tree that is sent from a to b.
struct Transfer {
    source: TempDir,
    to: TempDir,
    sending: Running,
    code: String,
}

impl Transfer {
    /// Offers a tree. With a limit the transfer takes some seconds.
    fn offered(net: &Net, bytes: usize, limit: Option<&str>) -> Self {
        let (source, to) = (tempdir().unwrap(), tempdir().unwrap());
        write(&source.path().join("holiday/small"), b"small");
        write(&source.path().join("holiday/large"), &content(1, bytes));
        let limited = limit.into_iter().flat_map(|limit| ["--limit", limit]);
        let arguments: Vec<_> = ["send", "--json", "holiday"]
            .into_iter()
            .chain(limited)
            .collect();
        let sending = Running::start(net.haul(0, source.path(), &arguments));
        let code = text(&sending.first, "code").unwrap_or_else(|| panic!("{}", sending.first));
        Self {
            source,
            to,
            sending,
            code,
        }
    }

    fn receive(&self, net: &Net) -> Running {
        Running::start(net.haul(
            1,
            self.to.path(),
            &["receive", "--yes", "--json", &self.code],
        ))
    }

    /// Reads to the end of the transfer. Returns the last path that it used, as both ends report it.
    fn ends(mut self, mut receiving: Running) -> String {
        while !receiving.line().is_empty() {}
        while !self.sending.line().is_empty() {}
        assert!(
            receiving.ends_well() && self.sending.ends_well(),
            "{}",
            receiving.said
        );
        assert_eq!(listing(self.to.path()), listing(self.source.path()));
        let [way, other] =
            [&receiving, &self.sending].map(|end| end.said.lines().rev().find_map(route));
        assert_eq!(way, other, "{}{}", receiving.said, self.sending.said);
        way.unwrap_or_else(|| panic!("no way: {}", receiving.said))
    }
}

/// The path in a line of JSON.
fn route(line: &str) -> Option<String> {
    text(line, "route").filter(|_| line.contains("\"type\":\"route\""))
}

/// A text in a line of JSON.
fn text(line: &str, name: &str) -> Option<String> {
    let (_, text) = line.split_once(&format!("\"{name}\":\""))?;
    text.split('"').next().map(str::to_owned)
}

/// Reads until a line says this.
fn until(receiving: &mut Running, says: impl Fn(&str) -> bool) {
    loop {
        let line = receiving.line();
        assert!(!line.is_empty(), "it ended before: {}", receiving.said);
        if says(&line) {
            return;
        }
    }
}

/// Whether the line reports that content has moved.
fn moves(line: &str) -> bool {
    line.contains("\"type\":\"progress\"") && !line.contains("\"bytes\":0,")
}

/// Returns the path by which a tree is sent.
fn way(a: Behind, b: Behind) -> Option<String> {
    let net = Net::new(a, b)?;
    let _relaying = net.relaying();
    let transfer = Transfer::offered(&net, 1 << 20, None);
    let receiving = transfer.receive(&net);
    Some(transfer.ends(receiving))
}

#[test]
fn two_nats_that_keep_a_port_are_punched_through() {
    if let Some(way) = way(Behind::Nat, Behind::Nat) {
        assert_eq!(way, "punched");
    }
}

#[test]
fn two_homes_with_equal_private_addresses_are_told_apart() {
    if let Some(way) = way(Behind::Home, Behind::Home) {
        assert_eq!(way, "punched");
    }
}

#[test]
fn a_nat_on_one_side_alone_does_not_prevent_a_direct_path() {
    if let Some(way) = way(Behind::Nothing, Behind::Nat) {
        assert_eq!(way, "direct");
    }
    if let Some(way) = way(Behind::Nat, Behind::Nothing) {
        assert_eq!(way, "punched");
    }
    if let Some(way) = way(Behind::Nothing, Behind::Symmetric) {
        assert_eq!(way, "direct");
    }
}

#[test]
fn two_nats_of_which_one_is_symmetric_need_the_relay() {
    for (a, b) in [
        (Behind::Symmetric, Behind::Symmetric),
        (Behind::Nat, Behind::Symmetric),
    ] {
        if let Some(way) = way(a, b) {
            assert_eq!(way, "relayed");
        }
    }
}

#[test]
fn two_ipv6_firewalls_are_opened_for_each_other() {
    if let Some(way) = way(Behind::Firewall6, Behind::Firewall6) {
        assert_eq!(way, "direct");
    }
}

#[test]
fn a_direct_transfer_survives_the_death_of_the_relay() {
    let Some(net) = Net::new(Behind::Nat, Behind::Nat) else {
        return;
    };
    let mut relaying = net.relaying();
    let transfer = Transfer::offered(&net, 4 << 20, Some("10M"));
    let mut receiving = transfer.receive(&net);
    until(&mut receiving, |line| {
        route(line).is_some_and(|way| way == "punched")
    });
    until(&mut receiving, moves);
    relaying.kill();
    transfer.ends(receiving);
}

#[test]
fn a_restarted_relay_is_found_by_both_under_the_same_number() {
    let Some(net) = Net::new(Behind::Nat, Behind::Nat) else {
        return;
    };
    let mut relaying = net.relaying();
    let transfer = Transfer::offered(&net, 1 << 20, None);
    relaying.kill();
    let _relaying = net.relaying();
    let receiving = transfer.receive(&net);
    assert_eq!(transfer.ends(receiving), "punched");
}

/// Takes away a NAT's outer address, with all its mappings, and gives it another, or the same again.
fn remap(net: &Net, router: &str, before: u8, after: u8) {
    net.hosts
        .ip(router, &format!("addr del 203.0.113.{before}/24 dev wan"))
        .unwrap();
    net.hosts
        .ip(router, &format!("addr add 203.0.113.{after}/24 dev wan"))
        .unwrap();
}

fn another_address_in_the_middle(router: &str, before: u8) {
    let Some(net) = Net::new(Behind::Nat, Behind::Nat) else {
        return;
    };
    let _relaying = net.relaying();
    let transfer = Transfer::offered(&net, 6 << 20, Some("10M"));
    let mut receiving = transfer.receive(&net);
    until(&mut receiving, moves);
    remap(&net, router, before, before + 10);
    transfer.ends(receiving);
}

#[test]
fn a_transfer_survives_a_new_address_of_the_receivers_nat() {
    another_address_in_the_middle("nb", 12);
}

#[test]
fn a_sender_whose_nat_gets_a_new_address_is_found_again() {
    another_address_in_the_middle("na", 11);
}

/// From now on new flows get another port, as after a restart of the NAT; its address stays.
fn other_ports_in_the_middle(router: &str, address: u8) {
    let Some(net) = Net::new(Behind::Nat, Behind::Nat) else {
        return;
    };
    let _relaying = net.relaying();
    let transfer = Transfer::offered(&net, 6 << 20, Some("10M"));
    let mut receiving = transfer.receive(&net);
    until(&mut receiving, moves);
    let another = format!(
        "flush chain ip nat out\n{}",
        masquerade("to :50000-50999").replace("oifname", "meta l4proto udp oifname")
    );
    net.hosts.nft(router, &another).unwrap();
    remap(&net, router, address, address);
    assert_eq!(transfer.ends(receiving), "punched");
}

#[test]
fn new_ports_of_the_receivers_nat_are_found() {
    other_ports_in_the_middle("nb", 12);
}

#[test]
fn new_ports_of_the_senders_nat_are_found() {
    other_ports_in_the_middle("na", 11);
}

#[test]
fn a_relayed_transfer_waits_until_the_relay_is_back() {
    let Some(net) = Net::new(Behind::Symmetric, Behind::Symmetric) else {
        return;
    };
    let mut relaying = net.relaying();
    let transfer = Transfer::offered(&net, 4 << 20, Some("10M"));
    let mut receiving = transfer.receive(&net);
    until(&mut receiving, moves);
    relaying.kill();
    let _relaying = net.relaying();
    assert_eq!(transfer.ends(receiving), "relayed");
}

#[test]
fn a_symmetric_nat_that_forgets_its_mappings_stays_relayed() {
    let Some(net) = Net::new(Behind::Symmetric, Behind::Symmetric) else {
        return;
    };
    let _relaying = net.relaying();
    let transfer = Transfer::offered(&net, 6 << 20, Some("10M"));
    let mut receiving = transfer.receive(&net);
    until(&mut receiving, moves);
    remap(&net, "nb", 12, 12);
    remap(&net, "na", 11, 11);
    assert_eq!(transfer.ends(receiving), "relayed");
}

fn another_address_of_a_relayed_end(router: &str, before: u8) {
    let Some(net) = Net::new(Behind::Symmetric, Behind::Symmetric) else {
        return;
    };
    let _relaying = net.relaying();
    let transfer = Transfer::offered(&net, 4 << 20, Some("10M"));
    let mut receiving = transfer.receive(&net);
    until(&mut receiving, moves);
    remap(&net, router, before, before + 10);
    assert_eq!(transfer.ends(receiving), "relayed");
}

#[test]
fn a_relayed_receiver_with_a_new_address_returns_to_the_relay() {
    another_address_of_a_relayed_end("nb", 12);
}

#[test]
fn a_relayed_sender_with_a_new_address_returns_to_the_relay() {
    another_address_of_a_relayed_end("na", 11);
}

#[test]
fn a_relayed_session_moves_once_a_direct_path_opens() {
    let Some(net) = Net::new(Behind::Nat, Behind::Nat) else {
        return;
    };
    let _relaying = net.relaying();
    let closed = "table inet closed {\n chain forwarded {\n type filter hook forward priority -10;\n ip daddr 203.0.113.11 drop\n }\n}\n";
    net.hosts.nft("nb", closed).unwrap();
    let transfer = Transfer::offered(&net, 12 << 20, Some("10M"));
    let mut receiving = transfer.receive(&net);
    until(&mut receiving, |line| {
        route(line).is_some_and(|way| way == "relayed")
    });
    until(&mut receiving, moves);
    net.hosts.nft("nb", "delete table inet closed\n").unwrap();
    assert_eq!(transfer.ends(receiving), "punched");
}

#[test]
fn blocked_udp_is_reported_in_time() {
    let Some(net) = Net::new(Behind::Nothing, Behind::Nat) else {
        return;
    };
    let _relaying = net.relaying();
    let blocked = "table inet blocked {\n chain forwarded {\n type filter hook forward priority -10;\n meta l4proto udp drop\n }\n}\n";
    net.hosts.nft("nb", blocked).unwrap();
    let transfer = Transfer::offered(&net, 1, None);
    let began = Instant::now();
    let received = net
        .haul(1, transfer.to.path(), &["receive", "--yes", &transfer.code])
        .output()
        .unwrap();
    println!("it took {:.1} s", began.elapsed().as_secs_f64());
    let said = String::from_utf8_lossy(&received.stderr);
    assert_eq!(received.status.code(), Some(3), "{said}");
    assert!(said.contains(RELAY) && said.contains("UDP"), "{said}");
    assert!(
        began.elapsed() < Duration::from_secs(25),
        "15 s, and some for a busy machine"
    );
    // The sender can still be found on its own network, under a number that no relay has given.
    let sending = Running::start(net.haul(1, transfer.source.path(), &["send", "holiday"]));
    assert!(!is_of_relay(&sending.code()), "{}", sending.first);
}

/// Whether a relay has given the code's number.
fn is_of_relay(code: &str) -> bool {
    code.parse::<ShortCode>().unwrap().is_of_relay()
}

#[test]
fn a_relay_with_a_token_serves_only_its_holders() {
    let Some(net) = Net::new(Behind::Nat, Behind::Nat) else {
        return;
    };
    std::fs::write(net.homes[2].path().join("token"), "swordfish\n").unwrap();
    let _relaying = net.relaying_with(&["--token-file", "token"]);
    let (source, to) = (tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("note"), b"note");
    let with = |token: &str, mut command: Command| {
        command.env("HAUL_RELAY_TOKEN", token);
        command
    };
    let send = || net.haul(0, source.path(), &["send", "note"]);
    let sending = Running::start(with("catfish", send()));
    assert!(!is_of_relay(&sending.code()), "{}", sending.first);
    let mut sending = Running::start(with("swordfish", send()));
    let code = sending.code();
    assert!(is_of_relay(&code), "{code}");
    let receive = || net.haul(1, to.path(), &["receive", "--yes", &code]);
    let refused = with("catfish", receive()).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        refused.status.code() == Some(4) && said.contains("token"),
        "{:?}: {said}",
        refused.status
    );
    done(with("swordfish", receive()));
    assert!(sending.ends_well());
    assert_eq!(listing(to.path()), listing(source.path()));
}

#[test]
fn a_paired_machine_is_found_through_the_relay_and_its_nat() {
    let Some(net) = Net::new(Behind::Nat, Behind::Nat) else {
        return;
    };
    let _relaying = net.relaying();
    let (source, inbox) = (tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("large"), &content(1, 1 << 20));
    let mut pairing = Running::start(net.haul(0, source.path(), &["pair", "bob"]));
    done(net.haul(1, inbox.path(), &["pair", "alice", &pairing.code()]));
    assert!(pairing.ends_well());
    let _serving = Running::start(net.haul(1, inbox.path(), &["serve"]));
    let sent = done(net.haul(0, source.path(), &["cp", "--json", "large", "bob:"]));
    assert_eq!(
        sent.lines().rev().find_map(route).as_deref(),
        Some("punched"),
        "{sent}"
    );
    assert!(std::fs::read(inbox.path().join("large")).unwrap() == content(1, 1 << 20));
}
