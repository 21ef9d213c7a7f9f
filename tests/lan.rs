//! Two machines on one network, as two network namespaces on a bridge: they find each other by the code alone. Needs root and
//! `ip`; skipped with the reason where either is missing.

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use support::command::{is_root, private};
use support::{LIMIT, content, listing, write};
use tempfile::{TempDir, tempdir};

/// Two namespaces, a and b, on the bridge of a third; gone when dropped.
struct Lan {
    names: [String; 3],
}

/// What an interface of each end gets.
#[derive(Clone, Copy, PartialEq)]
enum Addresses {
    /// IPv4, and of IPv6 what each interface gives itself.
    Both,
    /// Only the latter.
    LinkLocal,
}

fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

impl Lan {
    /// `None`, with the reason printed, where there can be none.
    fn new(addresses: Addresses) -> Option<Self> {
        if !is_root() {
            println!("skipped: network namespaces need root");
            return None;
        }
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let lan = Self { names: ["a", "b", "s"].map(|end| format!("haul{}-{number}{end}", std::process::id())) };
        match lan.build(addresses) {
            Ok(()) => Some(lan),
            Err(why) => {
                println!("skipped: no network namespaces here: {why}");
                None
            }
        }
    }

    fn build(&self, addresses: Addresses) -> Result<(), String> {
        for name in &self.names {
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        let [a, b, switch] = &self.names;
        ip(&format!("-n {switch} link add br0 type bridge"))?;
        ip(&format!("-n {switch} link set br0 up"))?;
        for (end, number) in [(a, 1), (b, 2)] {
            ip(&format!("link add eth0 netns {end} type veth peer name port{number} netns {switch}"))?;
            ip(&format!("-n {switch} link set port{number} master br0 up"))?;
            if addresses == Addresses::Both {
                ip(&format!("-n {end} addr add 10.77.0.{number}/24 dev eth0"))?;
            }
            ip(&format!("-n {end} link set eth0 up"))?;
        }
        // An address that a link gives itself may be used once it has been asked about on the link.
        let settled = Instant::now() + LIMIT;
        while [a, b].iter().any(|end| !has_link_local(end)) {
            if Instant::now() > settled {
                return Err("no link-local address".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn haul(&self, end: usize, home: &TempDir, from: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[end], env!("CARGO_BIN_EXE_haul")]).args(arguments);
        command.current_dir(from).env("HAUL_HOME", home.path()).env_remove("HAUL_LOG").stdin(Stdio::null());
        command
    }
}

fn has_link_local(end: &str) -> bool {
    let output = Command::new("ip").args(["-n", end, "-6", "addr", "show", "dev", "eth0", "scope", "link"]).output();
    let output = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    output.contains("fe80") && !output.contains("tentative")
}

impl Drop for Lan {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

/// A sender that is killed when it is dropped, and its code.
struct Sending(Child, String);

impl Sending {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let code = line.trim().strip_prefix("Code: ").unwrap_or_else(|| panic!("{line}")).to_owned();
        Self(child, code)
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ends well, and what it has said.
fn done(mut command: Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A process that is killed when it is dropped.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> Self {
        Self(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn two_machines_that_were_paired_need_no_code_and_no_address() {
    let Some(lan) = Lan::new(Addresses::Both) else { return };
    let (alice, bob, source, to) = (private(), private(), tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("holiday/large"), &content(1, 1 << 20));
    let mut pairing = Sending::start(lan.haul(0, &alice, source.path(), &["pair", "bob"]));
    let paired = done(lan.haul(1, &bob, to.path(), &["pair", "alice", &pairing.1]));
    assert!(paired.starts_with("Paired: alice is SHA256:"), "{paired}");
    assert!(pairing.0.wait().unwrap().success());
    let again = lan.haul(1, &bob, to.path(), &["pair", "alice", &pairing.1]).output().unwrap();
    assert_eq!(again.status.code(), Some(2), "a name is not given away in silence");

    let mut sending = Running::start(lan.haul(0, &alice, source.path(), &["send", "--to", "bob", "holiday"]));
    done(lan.haul(1, &bob, to.path(), &["receive", "--from", "alice", "--yes"]));
    assert!(sending.0.wait().unwrap().success());
    assert_eq!(listing(to.path()), listing(source.path()));

    let inbox = tempdir().unwrap();
    let serving = Running::start(lan.haul(1, &bob, inbox.path(), &["serve"]));
    done(lan.haul(0, &alice, source.path(), &["cp", "holiday", "bob:"]));
    assert_eq!(done(lan.haul(0, &alice, source.path(), &["ls", "bob:holiday"])), "large\n");
    done(lan.haul(0, &alice, source.path(), &["cp", "bob:holiday/large", "again"]));
    assert!(std::fs::read(source.path().join("again")).unwrap() == content(1, 1 << 20));

    // Forgotten there, alice is nobody.
    done(lan.haul(1, &bob, to.path(), &["peers", "--remove", "alice"]));
    let refused = lan.haul(0, &alice, source.path(), &["ls", "bob:"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(4), "{}", String::from_utf8_lossy(&refused.stderr));
    drop(serving);
    let unknown = lan.haul(0, &alice, source.path(), &["cp", "holiday", "carol:"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("haul pair carol"));
}

#[test]
fn a_ticket_works_where_nobody_announces_anything_and_a_pipe_ends_in_one() {
    let Some(lan) = Lan::new(Addresses::Both) else { return };
    let (alice, bob, source, to) = (private(), private(), tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("small"), b"small");
    // A ticket names the port, so that nothing has to be looked for.
    let mut command = lan.haul(0, &alice, source.path(), &["send", "--ticket", "small"]);
    let mut sending = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut ticket = String::new();
    BufReader::new(sending.stdout.as_mut().unwrap()).read_line(&mut ticket).unwrap();
    assert!(ticket.starts_with("HAUL:"), "{ticket}");
    write(&to.path().join("ticket"), ticket.as_bytes());
    let cut = lan.haul(1, &bob, to.path(), &["receive", ticket.trim().trim_end_matches(char::is_alphanumeric)]);
    assert_eq!({ cut }.output().unwrap().status.code(), Some(2), "and nothing is burnt by it");
    done(lan.haul(1, &bob, to.path(), &["receive", "--yes", "--ticket-file", "ticket"]));
    assert!(sending.wait().unwrap().success());
    assert_eq!(std::fs::read(to.path().join("small")).unwrap(), b"small");

    let mut command = lan.haul(0, &alice, source.path(), &["send", "-", "--name", "d.tar"]);
    command.stdin(std::fs::File::open(source.path().join("small")).unwrap());
    let mut sending = Sending::start(command);
    assert_eq!(done(lan.haul(1, &bob, to.path(), &["receive", "--yes", "--to", "-", &sending.1])), "small");
    assert!(sending.0.wait().unwrap().success());
}

fn a_tree_goes_over(addresses: Addresses) {
    let Some(lan) = Lan::new(addresses) else { return };
    let (alice, bob, source, to) = (private(), private(), tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("holiday/small"), b"small");
    write(&source.path().join("holiday/large"), &content(1, 3 << 20));
    let mut sending = Sending::start(lan.haul(0, &alice, source.path(), &["send", "holiday"]));
    let received = lan.haul(1, &bob, to.path(), &["receive", "--yes", &sending.1]).output().unwrap();
    assert!(received.status.success(), "{}", String::from_utf8_lossy(&received.stderr));
    assert!(sending.0.wait().unwrap().success());
    assert_eq!(listing(to.path()), listing(source.path()));
}

#[test]
fn two_machines_on_one_network_find_each_other_by_the_code() {
    a_tree_goes_over(Addresses::Both);
}

#[test]
fn they_do_so_without_any_address_but_those_that_links_give_themselves() {
    a_tree_goes_over(Addresses::LinkLocal);
}

#[test]
fn whoever_is_not_there_is_said_so_in_time() {
    let Some(lan) = Lan::new(Addresses::Both) else { return };
    let bob = private();
    let received = lan.haul(1, &bob, bob.path(), &["receive", "--yes", "417-maple-canyon-orbit"]).output().unwrap();
    assert_eq!(received.status.code(), Some(3));
    let said = String::from_utf8_lossy(&received.stderr);
    assert!(said.contains("nobody on this network offered 417"), "{said}");
}
