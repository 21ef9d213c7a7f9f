//! Hosts on one machine, as network namespaces. They need root and `ip`; with routers among them, `nft` too.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::LIMIT;
use super::command::is_root;

/// Some hosts; removed when dropped, with the processes that run on them.
pub(crate) struct Hosts {
    prefix: String,
    names: Vec<&'static str>,
}

/// Runs `ip` with these arguments.
pub(crate) fn ip(arguments: &str) -> Result<(), String> {
    run(Command::new("ip").args(arguments.split(' ')))
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .output()
        .map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

impl Hosts {
    /// Makes hosts without any network but loopback.
    pub(crate) fn new(names: &[&'static str]) -> Result<Self, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        if !is_root() {
            return Err("network namespaces need root".into());
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut hosts = Self {
            prefix: format!("haul{}-{number}", std::process::id()),
            names: Vec::new(),
        };
        for name in names {
            ip(&format!("netns add {}", hosts.of(name)))?;
            hosts.names.push(name);
            hosts.ip(name, "link set lo up")?;
        }
        Ok(hosts)
    }

    fn of(&self, host: &str) -> String {
        format!("{}{host}", self.prefix)
    }

    /// Runs `ip` on a host.
    pub(crate) fn ip(&self, host: &str, arguments: &str) -> Result<(), String> {
        ip(&format!("-n {} {arguments}", self.of(host)))
    }

    /// Connects two devices, each on a host, by a cable.
    pub(crate) fn wire(&self, one: (&str, &str), other: (&str, &str)) -> Result<(), String> {
        let [end, peer] = [self.of(one.0), self.of(other.0)];
        ip(&format!(
            "link add {} netns {end} type veth peer name {} netns {peer}",
            one.1, other.1
        ))
    }

    /// Makes a host a switch.
    pub(crate) fn switch(&self, host: &str) -> Result<(), String> {
        self.ip(host, "link add br0 type bridge")?;
        self.ip(host, "link set br0 up")
    }

    /// Connects a device to a switch by a cable.
    pub(crate) fn plug(&self, (host, device): (&str, &str), switch: &str) -> Result<(), String> {
        let port = format!("to-{host}");
        self.wire((host, device), (switch, &port))?;
        self.ip(switch, &format!("link set {port} master br0 up"))
    }

    /// Writes a kernel setting of a host.
    pub(crate) fn set(&self, host: &str, file: &str, value: &str) -> Result<(), String> {
        run(self
            .on(host, "sh")
            .args(["-c", &format!("echo {value} > /proc/sys/{file}")]))
    }

    /// Adds packet rules on a host.
    pub(crate) fn nft(&self, host: &str, rules: &str) -> Result<(), String> {
        let mut command = self.on(host, "nft");
        let mut nft = command
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let nft = nft.as_mut().map_err(|error| format!("nft: {error}"))?;
        nft.stdin
            .take()
            .map(|mut input| input.write_all(rules.as_bytes()));
        match nft.wait() {
            Ok(status) if status.success() => Ok(()),
            _ => Err(format!("nft refuses the rules on {host}")),
        }
    }

    /// A program on a host.
    pub(crate) fn on(&self, host: &str, program: &str) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.of(host), program])
            .stdin(Stdio::null());
        command
    }

    /// Runs haul on a host. `ip` execs it, so that killing the child kills haul.
    pub(crate) fn haul(
        &self,
        host: &str,
        home: &TempDir,
        from: &Path,
        arguments: &[&str],
    ) -> Command {
        let mut command = self.on(host, env!("CARGO_BIN_EXE_haul"));
        command.args(arguments);
        command
            .current_dir(from)
            .env("HAUL_HOME", home.path())
            .env_remove("HAUL_LOG")
            .env_remove("HAUL_RELAY");
        command
    }

    /// Waits until each of these hosts may use its link-local address, after duplicate detection.
    pub(crate) fn settle(&self, hosts: &[&str], device: &str) -> Result<(), String> {
        let until = Instant::now() + LIMIT;
        let settled = |host: &&str| {
            let mut command = Command::new("ip");
            command.args([
                "-n",
                &self.of(host),
                "-6",
                "addr",
                "show",
                "dev",
                device,
                "scope",
                "link",
            ]);
            let output = command
                .output()
                .map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            output.is_ok_and(|output| output.contains("fe80") && !output.contains("tentative"))
        };
        while !hosts.iter().all(settled) {
            if Instant::now() > until {
                return Err("no link-local address".into());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {}", self.of(name)));
        }
    }
}

/// Returns the value, or prints why it could not be made.
pub(crate) fn or_skip<T>(built: Result<T, String>) -> Option<T> {
    built
        .inspect_err(|why| println!("skipped: no hosts of its own here: {}", why.trim()))
        .ok()
}

/// A process that is killed when it is dropped, and its first line.
pub(crate) struct Running {
    child: Child,
    pub(crate) first: String,
    /// Everything of its output that was read.
    pub(crate) said: String,
    rest: BufReader<ChildStdout>,
}

impl Running {
    /// Starts it, and waits for its first line.
    pub(crate) fn start(mut command: Command) -> Self {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut rest = BufReader::new(child.stdout.take().unwrap());
        let mut first = String::new();
        rest.read_line(&mut first).unwrap();
        Self {
            child,
            said: first.clone(),
            first,
            rest,
        }
    }

    /// The code that `haul send` and `haul pair` print first.
    pub(crate) fn code(&self) -> String {
        self.first
            .trim()
            .strip_prefix("Code: ")
            .unwrap_or_else(|| panic!("{}", self.first))
            .to_owned()
    }

    /// Returns its next line; empty at the end.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.rest.read_line(&mut line).unwrap();
        self.said.push_str(&line);
        line
    }

    /// Waits for its exit. Returns whether it succeeded.
    pub(crate) fn ends_well(&mut self) -> bool {
        self.child.wait().unwrap().success()
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits for a successful exit, and returns the output.
pub(crate) fn done(mut command: Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
