//! The command as a separate process, for tests of other users and of kills.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use haul::{Client, Config, Identity, KeyId, ServerTrust};
use tempfile::{TempDir, tempdir};

/// The user `nobody` on every common system.
const NOBODY: u32 = 65_534;

/// Stands for no `--anyone` among the arguments.
const CLOSED: &str = "closed";

/// The file in HAUL_HOME that takes the log of a server.
const LOG: &str = "serve.log";

/// Whether this process is root, for which modes have no effect.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs haul with a HAUL_HOME of its own, without a terminal and without input, in a directory.
pub(crate) fn haul(from: &Path, arguments: &[&str]) -> Output {
    let home = private();
    Command::new(env!("CARGO_BIN_EXE_haul"))
        .args(arguments)
        .current_dir(from)
        .env("HAUL_HOME", home.path())
        .env_remove("HAUL_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// A new directory that others cannot read, as HAUL_HOME requires.
pub(crate) fn private() -> TempDir {
    let directory = tempdir().unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o700)).unwrap();
    directory
}

/// A `haul serve` that admits every key, and runs until it is dropped.
pub(crate) struct Serving {
    child: Child,
    pub url: String,
    pub port: u16,
    pub key_id: KeyId,
    home: TempDir,
    pub served: TempDir,
    /// The key that its clients share: one client can resume what another left unfinished.
    client: Identity,
    _output: BufReader<ChildStdout>,
}

impl Serving {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_in(private(), tempdir().unwrap(), None, arguments)
    }

    /// Starts it so that it admits only [listed](Self::authorize) keys.
    pub(crate) fn start_closed() -> Self {
        Self::start(&[CLOSED])
    }

    /// Starts it with these files in the served directory.
    pub(crate) fn start_with(arguments: &[&str], fill: impl FnOnce(&Path)) -> Self {
        let served = tempdir().unwrap();
        fill(served.path());
        Self::start_in(private(), served, None, arguments)
    }

    /// Starts it as a user who is not root, also if the test runs as root.
    pub(crate) fn start_as_nobody(arguments: &[&str]) -> Self {
        let (home, served) = (private(), tempdir().unwrap());
        // The build's own directory may be closed to others. A process of its own copies: a file that this one has open for
        // writing is "busy" for as long as a child of another test shares it.
        let copied = Command::new("cp")
            .arg(env!("CARGO_BIN_EXE_haul"))
            .arg(home.path().join("haul"))
            .status();
        assert!(copied.unwrap().success());
        let user = is_root().then_some(NOBODY);
        for path in [home.path(), &home.path().join("haul"), served.path()] {
            chown(path, user, user).unwrap();
        }
        Self::start_in(home, served, user, arguments)
    }

    fn start_in(home: TempDir, served: TempDir, user: Option<u32>, arguments: &[&str]) -> Self {
        Self::start_on(super::own_port(), home, served, user, arguments)
    }

    fn start_on(
        port: u16,
        home: TempDir,
        served: TempDir,
        user: Option<u32>,
        arguments: &[&str],
    ) -> Self {
        let copy = home.path().join("haul");
        let program = if copy.exists() {
            copy
        } else {
            env!("CARGO_BIN_EXE_haul").into()
        };
        let mut command = Command::new(program);
        command
            .arg("serve")
            .arg(served.path())
            .args(["--listen", &format!("127.0.0.1:{port}")]);
        let closed = arguments == [CLOSED];
        if !closed && !arguments.contains(&"--anyone") {
            command.args(["--anyone", "both"]);
        }
        command
            .args(arguments.iter().filter(|_| !closed))
            .current_dir(served.path())
            .env("HAUL_HOME", home.path())
            .env_remove("HAUL_LOG");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(home.path().join(LOG)).unwrap());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut said = String::new();
        while !said.contains("Ctrl-C") {
            assert!(
                output.read_line(&mut said).unwrap() > 0,
                "serve ended: {said}"
            );
        }
        let word = |after: &str| {
            said.split(after)
                .nth(1)
                .unwrap()
                .split_whitespace()
                .next()
                .unwrap()
                .to_owned()
        };
        let (url, key_id) = (word("  at "), word("key id ").parse().unwrap());
        let port = url
            .trim_end_matches('/')
            .rsplit(':')
            .next()
            .unwrap()
            .parse()
            .unwrap();
        let client = Identity::generate().unwrap();
        Self {
            child,
            url,
            port,
            key_id,
            home,
            served,
            client,
            _output: output,
        }
    }

    /// The process's resident memory in bytes.
    #[cfg(target_os = "linux")]
    pub(crate) fn resident(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<usize>().unwrap() << 10
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    /// Lists a new key in authorized_keys, which is read for each connection.
    pub(crate) fn authorize(&self) -> Identity {
        let identity = Identity::generate().unwrap();
        let file = self.home.path().join("authorized_keys");
        let listed = std::fs::read_to_string(&file).unwrap_or_default();
        std::fs::write(file, format!("{listed}{} listed\n", identity.key_id())).unwrap();
        identity
    }

    /// What it has logged.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.home.path().join(LOG)).unwrap()
    }

    /// Kills it without closing its connections.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Kills it without closing its connections, and starts it again on another port.
    pub(crate) fn restart(mut self, arguments: &[&str]) -> Self {
        self.kill();
        let home = std::mem::replace(&mut self.home, private());
        let served = std::mem::replace(&mut self.served, tempdir().unwrap());
        let user = (is_root() && home.path().join("haul").exists()).then_some(NOBODY);
        let mut again = Self::start_in(home, served, user, arguments);
        again.client = self.client.clone();
        again
    }

    /// Starts it again on the same port after a kill.
    pub(crate) fn restart_there(mut self, arguments: &[&str]) -> Self {
        let home = std::mem::replace(&mut self.home, private());
        let served = std::mem::replace(&mut self.served, tempdir().unwrap());
        Self::start_on(self.port, home, served, None, arguments)
    }

    /// A client that does not retry when the connection is lost.
    pub(crate) async fn connect(&self) -> Client {
        let trust = ServerTrust {
            pin: Some(self.key_id),
            ..ServerTrust::default()
        };
        let config = Config {
            retry_for: Duration::ZERO,
            ..Config::default()
        };
        Client::connect(&self.client, &trust, "127.0.0.1", self.port, &config)
            .await
            .unwrap()
    }

    /// `haul cp ARGUMENTS haul://HERE/INTO`.
    pub(crate) fn cp(&self, from: &Path, arguments: &[&str], into: &str) -> Output {
        let (place, pin) = (format!("{}{into}", self.url), self.key_id.to_string());
        let all: Vec<&str> = ["cp", "--pin", &pin]
            .iter()
            .chain(arguments)
            .copied()
            .chain([&place[..]])
            .collect();
        haul(from, &all)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
