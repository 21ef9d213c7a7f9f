//! The command as a user types it.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::support::{content, listing, own_port, write};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

/// Runs haul with a HAUL_HOME, without a terminal and without input, in a directory.
fn haul(home: &Path, from: &Path, arguments: &[&str]) -> Output {
    command(home, from, arguments).output().unwrap()
}

fn command(home: &Path, from: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_haul"));
    command
        .args(arguments)
        .current_dir(from)
        .env("HAUL_HOME", home)
        .env_remove("HAUL_LOG")
        .stdin(Stdio::null());
    command
}

/// Runs a command whose standard error is a terminal. Returns its exit code and everything that it wrote there.
fn on_terminal(command: &mut Command) -> (Option<i32>, String) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let terminal = std::fs::File::options()
        .read(true)
        .write(true)
        .open(name.to_str().unwrap())
        .unwrap();
    let mut child = command
        .stdout(Stdio::null())
        .stderr(terminal)
        .spawn()
        .unwrap();
    // The command keeps its copy of the terminal, and with it the terminal open, until it gets another.
    command.stderr(Stdio::null());
    let mut said = Vec::new();
    // When no process has the terminal open any more, Linux answers with EIO; other systems end the file.
    let _ = std::fs::File::from(master).read_to_end(&mut said);
    (child.wait().unwrap().code(), text(&said))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A new directory that others cannot read, as HAUL_HOME requires.
fn private() -> TempDir {
    let directory = tempdir().unwrap();
    std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o700)).unwrap();
    directory
}

/// Whether a line of JSON reports that content is on its way. The server has probed its directory by then, and a kill
/// leaves nothing there but the partial.
fn has_moved(line: &str) -> bool {
    let object: serde_json::Value = serde_json::from_str(line).unwrap();
    object["type"] == "progress" && object["bytes"].as_u64() > Some(0)
}

/// A `haul serve` that runs until it is dropped.
struct Serving {
    child: Child,
    url: String,
    key_id: String,
    home: TempDir,
    served: TempDir,
    output: BufReader<std::process::ChildStdout>,
}

impl Serving {
    fn start(arguments: &[&str]) -> Self {
        let address = format!("127.0.0.1:{}", own_port());
        Self::start_in(private(), tempdir().unwrap(), &address, arguments)
    }

    /// Ends it without closing its connections, and starts it again with the same arguments.
    fn restart(mut self, arguments: &[&str]) -> Self {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let (home, served) = (private(), tempdir().unwrap());
        let (home, served) = (
            std::mem::replace(&mut self.home, home),
            std::mem::replace(&mut self.served, served),
        );
        let address = self
            .url
            .trim_start_matches("haul://")
            .trim_end_matches('/')
            .to_owned();
        Self::start_in(home, served, &address, arguments)
    }

    fn start_in(home: TempDir, served: TempDir, listen: &str, arguments: &[&str]) -> Self {
        let mut all = vec!["serve", served.path().to_str().unwrap(), "--listen", listen];
        all.extend(arguments);
        let mut child = command(home.path(), served.path(), &all)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
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
        Self {
            url: word("  at "),
            key_id: word("key id "),
            child,
            home,
            served,
            output,
        }
    }

    fn cp(&self, client: &Client, arguments: &[&str], into: &str) -> Output {
        let place = format!("{}{into}", self.url);
        let all: Vec<&str> = ["cp", "--pin", &self.key_id]
            .iter()
            .chain(arguments)
            .copied()
            .chain([&place[..]])
            .collect();
        haul(client.home.path(), client.files.path(), &all)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it has exited by itself.
    fn ended(&mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        (code, rest)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client's HAUL_HOME and its files.
struct Client {
    home: TempDir,
    files: TempDir,
}

fn client() -> Client {
    Client {
        home: private(),
        files: tempdir().unwrap(),
    }
}

#[test]
fn id_prints_the_key_id_alone_and_keeps_the_key_private() {
    let home = tempdir().unwrap();
    let at = home.path().join("new");
    let (first, second) = (
        haul(&at, home.path(), &["id"]),
        haul(&at, home.path(), &["id"]),
    );
    assert_eq!(first.stdout, second.stdout);
    let id = text(&first.stdout);
    assert!(
        id.starts_with("SHA256:") && id.ends_with('\n') && id.lines().count() == 1,
        "{id}"
    );
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&at), mode(&at.join("key.pem"))), (0o700, 0o600));

    std::fs::set_permissions(at.join("key.pem"), PermissionsExt::from_mode(0o644)).unwrap();
    let open = haul(&at, home.path(), &["id"]);
    assert_eq!(open.status.code(), Some(2));
    assert!(
        text(&open.stderr).contains("chmod"),
        "it says how to mend it: {}",
        text(&open.stderr)
    );
}

#[test]
fn every_help_fits_a_screen_and_shows_an_example() {
    let home = tempdir().unwrap();
    for arguments in [
        &["--help"][..],
        &["serve", "--help"],
        &["cp", "--help"],
        &["ls", "--help"],
        &["bench", "--help"],
        &["send", "--help"],
        &["receive", "--help"],
        &["pair", "--help"],
        &["peers", "--help"],
        &["relay", "--help"],
        &["sync", "--help"],
        &["id", "--help"],
        &["demo", "--help"],
    ] {
        let help = text(&haul(home.path(), home.path(), arguments).stdout);
        assert!(
            help.lines().count() <= 24,
            "{arguments:?}: {} lines\n{help}",
            help.lines().count()
        );
        assert!(
            help.lines().all(|line| line.chars().count() <= 80),
            "{arguments:?}:\n{help}"
        );
        assert!(
            help.contains("Example") || help.contains("Try it"),
            "{arguments:?}:\n{help}"
        );
    }
}

#[test]
fn a_tree_arrives_and_a_second_run_has_nothing_to_do() {
    let (server, client) = (Serving::start(&["--anyone", "write"]), client());
    for i in 0..50 {
        write(
            &client.files.path().join(format!("photos/{i}.jpg")),
            &content(i, 1000 * i as usize),
        );
    }
    write(
        &client.files.path().join("photos/raw/big"),
        &content(99, 3_000_000),
    );
    let first = server.cp(&client, &["-r", "photos"], "2026");
    assert_eq!(first.status.code(), Some(0), "{}", text(&first.stderr));
    assert!(
        text(&first.stderr).starts_with("51 files, 4.0"),
        "{}",
        text(&first.stderr)
    );
    assert_eq!(
        listing(&server.served.path().join("2026")),
        listing(&client.files.path().join("photos"))
    );
    let second = server.cp(&client, &["photos"], "2026");
    assert!(
        text(&second.stderr).contains("51 files unchanged"),
        "{}",
        text(&second.stderr)
    );
    // With a trailing slash the file goes into the directory, under its own name.
    assert_eq!(
        server.cp(&client, &["photos"], "2026/").status.code(),
        Some(0)
    );
    assert!(server.served.path().join("2026/photos/raw/big").exists());
}

#[test]
fn without_a_terminal_an_unknown_server_is_not_trusted() {
    let (server, client) = (Serving::start(&["--anyone", "both"]), client());
    write(&client.files.path().join("f"), b"x");
    let plain = |client: &Client| {
        haul(
            client.home.path(),
            client.files.path(),
            &["cp", "f", &server.url],
        )
    };
    let unknown = plain(&client);
    assert_eq!(unknown.status.code(), Some(4));
    assert!(
        text(&unknown.stderr).contains(&format!("--pin {}", server.key_id)),
        "{}",
        text(&unknown.stderr)
    );

    let host = server
        .url
        .trim_start_matches("haul://")
        .trim_end_matches('/');
    let known = client.home.path().join("known_hosts");
    std::fs::write(&known, format!("# mine\n{host} {}\n", server.key_id)).unwrap();
    assert_eq!(plain(&client).status.code(), Some(0));

    let other = text(&haul(private().path(), client.files.path(), &["id"]).stdout);
    std::fs::write(&known, format!("{host} {other}")).unwrap();
    let changed = plain(&client);
    assert_eq!(changed.status.code(), Some(4));
    assert!(
        text(&changed.stderr).contains("HAS CHANGED")
            && text(&changed.stderr).contains("known_hosts")
    );
    let pinned = haul(
        client.home.path(),
        client.files.path(),
        &["cp", "--pin", other.trim(), "f", &server.url],
    );
    assert_eq!(pinned.status.code(), Some(4));
    assert!(
        text(&pinned.stderr).contains("not the pinned"),
        "{}",
        text(&pinned.stderr)
    );
}

#[test]
fn a_refused_user_sees_the_line_that_would_admit_them() {
    let (server, client) = (Serving::start(&[]), client());
    write(&client.files.path().join("f"), b"x");
    let refused = server.cp(&client, &["f"], "");
    assert_eq!(refused.status.code(), Some(4));
    let own = text(&haul(client.home.path(), client.files.path(), &["id"]).stdout)
        .trim()
        .to_owned();
    let said = text(&refused.stderr);
    assert!(
        said.contains(&own) && said.contains("authorized_keys"),
        "{said}"
    );
    // The file is read at each connection: no restart is needed.
    std::fs::write(
        server.home.path().join("authorized_keys"),
        format!("{own} me # at home\n"),
    )
    .unwrap();
    assert_eq!(server.cp(&client, &["f"], "").status.code(), Some(0));
    let reading = Serving::start(&["--anyone", "read"]);
    let denied = reading.cp(&client, &["f"], "");
    assert_eq!(denied.status.code(), Some(4), "{}", text(&denied.stderr));
}

#[test]
fn invalid_arguments_are_reported_before_anything_happens() {
    let client = client();
    write(&client.files.path().join("f"), b"x");
    for (arguments, word) in [
        (&["cp", "f"][..], "DST"),
        (&["cp", "f", "elsewhere"], "haul://"),
        (&["cp", "f", "host:dir"], "ssh"),
        (&["cp", "haul://h/x", "haul://i/"], "server to server"),
        (&["cp", "-P", "22", "f", "haul://h/"], "haul://host:"),
        (&["cp", "f", "haul://h/../x"], "`..`"),
        (&["cp", "--pin", "SHA256:no", "f", "haul://h/"], "SHA256"),
        (&["bench", "host"], "haul://"),
        (&["bench", "--time", "61", "haul://h"], "60"),
        (&["bench", "--up", "--down", "haul://h"], "--down"),
        (
            &["cp", "--retry-for", "soon", "f", "haul://h/"],
            "30s, 10m, 2h or 7d",
        ),
        (&["cp", "--retry-for", "-5", "f", "haul://h/"], "-5"),
        (&["serve", "--listen", "nowhere"], "192.0.2.1:4433"),
        (&["serve", "--max-transfers", "0"], "max-transfers"),
        (&["cp", "--limit", "fast", "f", "haul://h/"], "20Mbit/s"),
        (&["cp", "--limit", "1000", "f", "haul://h/"], "1000KiB"),
        (&["cp", "--limit", "0", "f", "haul://h/"], "no unit"),
        (&["cp", "--limit", "-1M", "f", "haul://h/"], "20Mbit/s"),
        (&["serve", "--limit", "1k"], "8 kbit/s"),
        (&["cp", "-l", "8000", "f", "haul://h/"], "--limit 8000k"),
        (&["cp", "--bwlimit=1m", "f", "haul://h/"], "KiB"),
        (&["paste"], "paste"),
    ] {
        let output = haul(client.home.path(), client.files.path(), arguments);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{arguments:?}: {}",
            text(&output.stderr)
        );
        assert!(
            text(&output.stderr).contains(word),
            "{arguments:?}: {}",
            text(&output.stderr)
        );
    }
}

#[test]
fn a_missing_server_and_a_failed_serve_are_reported_at_once() {
    let client = client();
    write(&client.files.path().join("f"), b"x");
    let port = own_port();
    let nobody = haul(
        client.home.path(),
        client.files.path(),
        &["cp", "f", &format!("haul://127.0.0.1:{port}/")],
    );
    assert_eq!(nobody.status.code(), Some(3));
    assert!(
        text(&nobody.stderr).contains("haul serve"),
        "{}",
        text(&nobody.stderr)
    );

    let place = format!("haul://127.0.0.1:{port}/");
    let json = haul(
        client.home.path(),
        client.files.path(),
        &["cp", "--json", "f", &place],
    );
    let object: serde_json::Value =
        serde_json::from_slice(&json.stdout).expect("one object, also when nothing begins");
    assert_eq!(
        (json.status.code(), &object["type"]),
        (Some(3), &"error".into())
    );
    assert!(
        object["why"].as_str().unwrap().contains("haul serve"),
        "{object}"
    );

    let server = Serving::start(&["--anyone", "both"]);
    let address = server
        .url
        .trim_start_matches("haul://")
        .trim_end_matches('/');
    let second = haul(
        client.home.path(),
        client.files.path(),
        &["serve", "--listen", address],
    );
    assert_ne!(second.status.code(), Some(0));
    assert!(
        text(&second.stderr).contains("--listen"),
        "{}",
        text(&second.stderr)
    );
    let missing = haul(
        client.home.path(),
        client.files.path(),
        &["serve", "missing"],
    );
    assert!(
        text(&missing.stderr).contains("missing"),
        "{}",
        text(&missing.stderr)
    );
    if cfg!(target_os = "linux") {
        // Not even root can write here.
        let read_only = haul(
            client.home.path(),
            client.files.path(),
            &["serve", "/proc/self", "--listen", "127.0.0.1:0"],
        );
        assert_ne!(read_only.status.code(), Some(0));
        assert!(
            text(&read_only.stderr).contains("/proc"),
            "{}",
            text(&read_only.stderr)
        );
    }
}

#[test]
fn failed_files_are_reported_and_the_rest_arrives() {
    let (server, client) = (Serving::start(&["--anyone", "write"]), client());
    write(&client.files.path().join("d/good"), b"good");
    let fifo = client.files.path().join("d/pipe\n\u{1b}[31m");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    let strict = ["-q", "--specials", "fail", "d", "missing"];
    for (arguments, failures) in [(&strict[..], 2), (&["-q", "d", "missing"], 1)] {
        let output = server.cp(&client, arguments, "");
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(said.contains("missing: No such file"), "{said}");
        assert_eq!(
            said.contains("d/pipe\\n\\u{1b}[31m: a FIFO"),
            failures == 2,
            "{said}"
        );
        assert_eq!(
            said.lines().count(),
            failures,
            "-q names failures and nothing else: {said}"
        );
    }
    assert_eq!(
        std::fs::read(server.served.path().join("d/good")).unwrap(),
        b"good"
    );
}

#[test]
fn failures_are_shown_on_every_kind_of_terminal() {
    let (server, client) = (Serving::start(&["--anyone", "write"]), client());
    write(&client.files.path().join("good"), b"good");
    for kind in ["dumb", "xterm"] {
        let arguments = [
            "cp",
            "--pin",
            &server.key_id,
            "good",
            "missing",
            &server.url,
        ];
        let mut command = command(client.home.path(), client.files.path(), &arguments);
        let (code, screen) = on_terminal(command.env("TERM", kind));
        assert_eq!(code, Some(1), "{kind}: {screen}");
        let failure = screen
            .find("missing: No such file")
            .unwrap_or_else(|| panic!("{kind}: {screen}"));
        let summary = screen
            .rfind(", 1 failed")
            .unwrap_or_else(|| panic!("{kind}: {screen}"));
        assert!(failure < summary, "{kind}: {screen}");
        assert_eq!(
            screen[summary..].trim(),
            ", 1 failed",
            "{kind}: nothing is drawn below the summary: {screen:?}"
        );
    }
}

#[test]
fn json_is_one_object_per_line_and_verbose_names_each_file() {
    let (server, client) = (Serving::start(&["--anyone", "write"]), client());
    write(&client.files.path().join("d/a"), b"12345");
    write(&client.files.path().join("d/empty"), b"");
    let output = server.cp(&client, &["--json", "d"], "");
    let objects: Vec<serde_json::Value> = text(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(objects[0]["type"], "start");
    let file = objects.iter().find(|o| o["path"] == "d/a").unwrap();
    assert_eq!(
        (&file["type"], &file["result"], &file["bytes"]),
        (&"file".into(), &"committed".into(), &5.into())
    );
    let done = objects.last().unwrap();
    assert_eq!(
        (&done["type"], &done["files"], &done["bytes"]),
        (&"done".into(), &2.into(), &5.into())
    );
    assert_eq!(done["durability"], "synced");
    assert!(output.stderr.is_empty());

    let again = text(&server.cp(&client, &["-v", "d"], "").stderr);
    assert!(again.contains("d/a (unchanged)"), "{again}");
}

#[test]
fn bench_reports_what_an_admitted_key_can_expect() {
    let (server, client) = (Serving::start(&["--anyone", "read"]), client());
    let bench = |arguments: &[&str]| {
        let all: Vec<&str> = ["bench", "--time", "1", &server.url]
            .iter()
            .chain(arguments)
            .copied()
            .collect();
        haul(client.home.path(), client.files.path(), &all)
    };
    assert_eq!(
        bench(&[]).status.code(),
        Some(4),
        "an unknown server is not trusted"
    );
    let output = bench(&["--pin", &server.key_id]);
    let said = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(said.lines().count(), 4, "{said}");
    assert!(
        said.lines().last().unwrap().starts_with("Expect about "),
        "{said}"
    );
    assert!(
        output.stderr.is_empty(),
        "no line that moves where there is no terminal: {}",
        text(&output.stderr)
    );
    assert_eq!(listing(server.served.path()), Vec::<String>::new());

    let json = bench(&["--pin", &server.key_id, "--down", "--json"]);
    let object: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert!(
        object["down"]["bits_per_second"].as_f64().unwrap() > 0.0,
        "{object}"
    );
    assert_eq!((&object["type"], object.get("up")), (&"bench".into(), None));
}

#[test]
fn the_summary_reports_the_bottleneck_of_a_push() {
    let (server, client) = (Serving::start(&["--anyone", "write"]), client());
    // Little work in a long time, so that the limit is the bottleneck on a busy machine too.
    write(&client.files.path().join("f"), &content(1, 200_000));
    let output = server.cp(&client, &["--json", "--limit", "50KB/s", "f"], "json");
    let done: serde_json::Value =
        serde_json::from_str(text(&output.stdout).lines().last().unwrap()).unwrap();
    assert_eq!(
        (&done["type"], &done["bound"]),
        (&"done".into(), &"limit".into()),
        "{done}"
    );
    assert!(done["time"]["limit"].as_f64().unwrap() > 0.5, "{done}");
    for figure in [
        "bytes_per_second",
        "rtt_ms",
        "sent_packets",
        "sent_bytes",
        "received_bytes",
        "mtu",
    ] {
        assert!(
            done["path"][figure].as_f64().unwrap() > 0.0,
            "{figure}: {done}"
        );
    }
    // On loopback the value can be zero after the peer's reported delay is subtracted.
    assert!(
        done["path"]["min_rtt_ms"].as_f64().unwrap() >= 0.0,
        "{done}"
    );
    assert!(
        done["path"]["lost_packets"].is_u64() && done["path"]["congestion_events"].is_u64(),
        "{done}"
    );

    let said = text(
        &server
            .cp(&client, &["-v", "--limit", "0.4Mbit", "f"], "plain")
            .stderr,
    );
    let lines: Vec<_> = said
        .lines()
        .skip_while(|line| !line.starts_with("1 file, "))
        .collect();
    assert!(lines[0].ends_with(", bound by --limit"), "{said}");
    let heads: Vec<_> = lines[1..]
        .iter()
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(
        heads,
        ["path", "packets", "bytes", "window", "time"],
        "{said}"
    );

    let said = text(&server.cp(&client, &["f"], "plain").stderr);
    assert!(said.starts_with("nothing to do in "), "{said}");
    let seconds: f64 = said["nothing to do in ".len()..]
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    // The transfer takes longer on a busy machine, and may then have another bottleneck.
    assert!(
        seconds >= 1.0 || !said.contains("bound"),
        "too short to say: {said}"
    );
}

#[test]
fn the_summary_of_a_pull_reports_the_servers_bottleneck() {
    let (server, client) = (Serving::start(&["--anyone", "read"]), client());
    // Little work in a long time, so that the limit is the bottleneck on a busy machine too.
    write(&server.served.path().join("f"), &content(1, 200_000));
    let fetch = |arguments: &[&str], to: &str| {
        let from = format!("{}f", server.url);
        let all: Vec<&str> = ["cp", "--pin", &server.key_id]
            .iter()
            .chain(arguments)
            .copied()
            .chain([&from[..], to])
            .collect();
        haul(client.home.path(), client.files.path(), &all)
    };
    let output = fetch(&["--json", "--limit", "50KB/s"], "json");
    let done: serde_json::Value =
        serde_json::from_str(text(&output.stdout).lines().last().unwrap()).unwrap();
    assert_eq!(
        (&done["type"], &done["bound"]),
        (&"done".into(), &"limit".into()),
        "{done}"
    );
    // The figures of the path are those of the server, which sent.
    assert!(
        done["path"]["sent_bytes"].as_f64().unwrap() > 200_000.0,
        "{done}"
    );
    assert_eq!(
        (&done["moved"], &done["held"]),
        (&200_000.into(), &0.into()),
        "{done}"
    );
    let said = text(&fetch(&["-v", "--limit", "0.4Mbit"], "plain").stderr);
    assert!(said.contains(", bound by --limit"), "{said}");
}

#[test]
fn qlog_traces_each_connection_at_both_ends() {
    let client = client();
    write(&client.files.path().join("f"), &content(1, 300_000));
    let traces = tempdir().unwrap();
    let at = |name: &str| traces.path().join("new").join(name);
    let server = Serving::start(&[
        "--anyone",
        "write",
        "--qlog",
        at("server").to_str().unwrap(),
    ]);
    for name in ["first", "second"] {
        let sent = server.cp(
            &client,
            &["--qlog", at("client").to_str().unwrap(), "f"],
            name,
        );
        assert_eq!(sent.status.code(), Some(0), "{}", text(&sent.stderr));
    }
    drop(server);
    for end in ["client", "server"] {
        let files: Vec<_> = std::fs::read_dir(at(end))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert_eq!(files.len(), 2, "{files:?}");
        assert!(
            files
                .iter()
                .all(|file| file.to_str().unwrap().contains(&format!("-{end}-"))),
            "{files:?}"
        );
    }
    // JSON text sequences (RFC 7464): each record between a record separator and a line feed.
    for file in std::fs::read_dir(at("client")).unwrap() {
        let trace = std::fs::read_to_string(file.unwrap().path()).unwrap();
        let records: Vec<serde_json::Value> = trace
            .split('\x1e')
            .skip(1)
            .map(|record| serde_json::from_str(record).expect("whole records"))
            .collect();
        let sent = records.iter().filter(|record| {
            record["name"]
                .as_str()
                .is_some_and(|n| n.ends_with("packet_sent"))
        });
        assert!(
            sent.count() > 300_000 / 6_500,
            "no packet is larger than 6,500 bytes"
        );
    }
    write(&client.files.path().join("taken"), b"");
    let no_directory = haul(
        client.home.path(),
        client.files.path(),
        &["cp", "--qlog", "taken", "f", "haul://127.0.0.1/"],
    );
    assert_eq!(
        no_directory.status.code(),
        Some(1),
        "{}",
        text(&no_directory.stderr)
    );
    assert!(
        text(&no_directory.stderr).contains("cannot write qlog files to taken"),
        "{}",
        text(&no_directory.stderr)
    );
}

#[test]
fn with_64_open_files_a_transfer_is_slower_but_succeeds() {
    let client = client();
    for i in 0..300 {
        write(
            &client.files.path().join(format!("t/{i}")),
            &content(i, if i % 10 == 0 { 400_000 } else { 900 }),
        );
    }
    let (home, served) = (private(), tempdir().unwrap());
    let limited = |home: &Path, arguments: &str| {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!(
            "ulimit -n 64 && exec {} {arguments}",
            env!("CARGO_BIN_EXE_haul")
        ));
        shell
            .env("HAUL_HOME", home)
            .current_dir(client.files.path())
            .stdin(Stdio::null());
        shell
    };
    let serve = format!(
        "serve {} --listen 127.0.0.1:0 --anyone write",
        served.path().display()
    );
    let mut child = limited(home.path(), &serve)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("Ctrl-C") {
        assert!(output.read_line(&mut said).unwrap() > 0);
    }
    let line = said.lines().find(|line| line.contains("haul cp")).unwrap();
    let pasted = line
        .trim()
        .trim_start_matches("haul ")
        .replace("FILE...", "t");
    let sent = limited(client.home.path(), &pasted).output().unwrap();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(sent.status.code(), Some(0), "{}", text(&sent.stderr));
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(
        listing(&served.path().join("t")),
        listing(&client.files.path().join("t"))
    );
}

#[test]
fn a_killed_client_leaves_no_half_file_and_a_rerun_resumes() {
    let (server, client) = (Serving::start(&["--anyone", "write"]), client());
    write(&client.files.path().join("big"), &content(1, 100 << 20));
    for _ in 0..3 {
        let place = format!("{}big", server.url);
        let mut first = command(
            client.home.path(),
            client.files.path(),
            &["cp", "--json", "--pin", &server.key_id, "big", &place],
        )
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
        let mut lines = BufReader::new(first.stdout.take().unwrap()).lines();
        assert!(
            lines.any(|line| has_moved(&line.unwrap())),
            "it moved something before it was killed"
        );
        first.kill().unwrap();
        first.wait().unwrap();
        assert!(!server.served.path().join("big").exists());
    }
    let rerun = server.cp(&client, &["big"], "big");
    assert_eq!(rerun.status.code(), Some(0), "{}", text(&rerun.stderr));
    assert_eq!(
        listing(server.served.path()),
        listing(client.files.path()),
        "and no partial stays behind"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_is_reported_and_leaves_no_half_file() {
    let (mut server, client) = (Serving::start(&["--anyone", "write"]), client());
    write(&client.files.path().join("big"), &content(1, 100 << 20));
    let port = server
        .url
        .trim_end_matches('/')
        .rsplit(':')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    let trust = haul::ServerTrust {
        pin: Some(server.key_id.parse().unwrap()),
        ..Default::default()
    };
    let identity = haul::Identity::generate().unwrap();
    // The command waits up to 60 s for an outage to end and tries again; this test need not.
    let (second, never) = (std::time::Duration::from_secs(1), std::time::Duration::ZERO);
    let config = haul::Config {
        idle_timeout: second,
        retry_for: never,
        ..Default::default()
    };
    let connected = haul::Client::connect(&identity, &trust, "127.0.0.1", port, &config)
        .await
        .unwrap();
    let (moved, moving) = tokio::sync::oneshot::channel::<()>();
    let moved = std::sync::Mutex::new(Some(moved));
    let observer: haul::Observer = std::sync::Arc::new(move |event| {
        if let haul::Event::Moved { .. } = event {
            drop(moved.lock().unwrap().take());
        }
    });
    let options = crate::support::to(&[&client.files.path().join("big")], "big");
    let pushing = tokio::spawn(async move { connected.push(&options, observer).await });
    let _ = moving.await;
    server.child.kill().unwrap();
    let ended = tokio::time::timeout(crate::support::LIMIT, pushing)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(ended, Err(haul::Error::Lost(_))), "{ended:?}");
    assert!(!server.served.path().join("big").exists());
}

#[test]
fn a_restarted_server_needs_no_second_command() {
    let (server, client) = (Serving::start(&["--anyone", "write"]), client());
    write(&client.files.path().join("big"), &content(1, 100 << 20));
    let arguments = [
        "cp",
        "--json",
        "--retry-for",
        "1h",
        "--pin",
        &server.key_id,
        "big",
        &server.url,
    ];
    let mut sending = command(client.home.path(), client.files.path(), &arguments);
    let mut sending = sending
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(sending.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    assert!(lines.any(|line| has_moved(&line)), "it moved something");
    let sender = Pid::from_child(&sending);
    // However fast this machine is, the transfer does not end before the server does.
    kill_process(sender, Signal::STOP).unwrap();
    let server = server.restart(&["--anyone", "write"]);
    kill_process(sender, Signal::CONT).unwrap();

    let objects: Vec<serde_json::Value> = lines
        .map(|line| serde_json::from_str(&line).unwrap())
        .collect();
    let mut said = String::new();
    sending
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(sending.wait().unwrap().code(), Some(0), "{said}");
    let of = |kind: &str| {
        objects
            .iter()
            .filter(|object| object["type"] == kind)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        (of("lost").len(), of("reconnected").len(), of("file").len()),
        (1, 1, 1),
        "{objects:?}"
    );
    assert_eq!(of("lost")[0]["retry_for"], 3600.0);
    assert!(!of("reconnecting").is_empty());
    let done = objects.last().unwrap();
    assert_eq!(
        (&done["type"], &done["files"], &done["bytes"]),
        (&"done".into(), &1.into(), &(100 << 20).into())
    );
    assert_eq!(
        listing(server.served.path()),
        listing(client.files.path()),
        "and no partial stays behind"
    );
}

#[test]
fn a_lost_server_is_waited_for_until_the_limit_or_ctrl_c() {
    for (retry_for, interrupt) in [("1", false), ("2h", true)] {
        let (mut server, client) = (Serving::start(&["--anyone", "write"]), client());
        write(&client.files.path().join("big"), &content(1, 100 << 20));
        let arguments = [
            "cp",
            "--retry-for",
            retry_for,
            "--pin",
            &server.key_id,
            "big",
            &server.url,
        ];
        let mut sending = command(client.home.path(), client.files.path(), &arguments);
        let mut sending = sending
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while std::fs::read_dir(server.served.path()).unwrap().count() == 0 {
            std::thread::yield_now();
        }
        let sender = Pid::from_child(&sending);
        kill_process(sender, Signal::STOP).unwrap();
        while server.child.try_wait().unwrap().is_none() {
            let _ = kill_process(Pid::from_child(&server.child), Signal::INT);
            std::thread::yield_now();
        }
        kill_process(sender, Signal::CONT).unwrap();
        let mut lines = BufReader::new(sending.stderr.take().unwrap())
            .lines()
            .map(Result::unwrap);
        let lost = lines
            .by_ref()
            .find(|line| line.contains("connection lost"))
            .expect("it says so");
        assert!(lost.starts_with("haul: connection lost ("), "{lost}");
        if interrupt {
            assert!(lost.ends_with("trying again, for 2 h at most"), "{lost}");
            kill_process(sender, Signal::INT).unwrap();
        }
        let rest: Vec<String> = lines.collect();
        let last = rest.last().unwrap();
        match (sending.wait().unwrap().code(), interrupt) {
            (Some(130), true) => assert!(last.contains("interrupted"), "{last}"),
            (Some(3), false) => {
                assert!(last.contains("cannot reconnect within 1 s"), "{last}");
                assert!(
                    last.contains("Committed files remain") && last.contains("same command"),
                    "{last}"
                );
            }
            other => panic!("{other:?}: {rest:?}"),
        }
        assert!(!server.served.path().join("big").exists());
    }
}

#[test]
fn the_first_signal_ends_a_server_with_0() {
    for signal in [Signal::INT, Signal::TERM] {
        let mut server = Serving::start(&["--anyone", "both"]);
        server.signal(signal);
        let (code, rest) = server.ended();
        assert_eq!(code, Some(0));
        assert!(rest.contains("Stopped"), "{rest}");
    }
}

#[test]
fn the_demo_proves_itself() {
    let files = tempdir().unwrap();
    write(&files.path().join("mine/a"), b"a");
    write(&files.path().join("mine/b/c"), &content(1, 300_000));
    let output = command(files.path(), files.path(), &["demo", "mine"])
        .env("TMPDIR", files.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(
        said.contains("2 files compared byte by byte: 2 equal, 0 different"),
        "{said}"
    );
}

#[test]
fn a_renamed_large_file_is_sent_again_only_on_demand() {
    let (server, client) = (Serving::start(&["--anyone", "both"]), client());
    let size = haul::internal::storage::digest_index::LARGE_FILE;
    let place = |name: &str| client.files.path().join(name);
    write(&place("a"), &content(1, size as usize));
    // A file written a moment ago may change again unnoticed.
    let hour = std::time::Duration::from_secs(3600);
    std::fs::File::options()
        .write(true)
        .open(place("a"))
        .unwrap()
        .set_modified(std::time::SystemTime::now() - hour)
        .unwrap();
    let moved = |arguments: &[&str]| {
        let output = server.cp(&client, arguments, "");
        let done: serde_json::Value =
            serde_json::from_str(text(&output.stdout).lines().last().unwrap()).unwrap();
        assert_eq!(
            (&done["type"], &done["files"]),
            (&"done".into(), &1.into()),
            "{done}"
        );
        done["moved"].as_u64().unwrap()
    };
    assert_eq!(moved(&["--json", "a"]), size);
    std::fs::rename(place("a"), place("b")).unwrap();
    assert_eq!(moved(&["--json", "b"]), 0);
    std::fs::rename(place("b"), place("c")).unwrap();
    assert_eq!(moved(&["--json", "--no-dedupe", "c"]), size);
    let whole = std::fs::read(place("c")).unwrap();
    for name in ["a", "b", "c"] {
        assert!(
            std::fs::read(server.served.path().join(name)).unwrap() == whole,
            "{name}"
        );
    }
}

#[test]
fn a_write_only_key_sees_why_it_may_not_mirror() {
    let (server, client) = (
        Serving::start(&["--anyone", "write", "--allow-delete"]),
        client(),
    );
    write(&client.files.path().join("t/a"), b"a");
    write(&server.served.path().join("t/old"), b"old");
    let url = format!("{}t", server.url);
    let output = haul(
        client.home.path(),
        client.files.path(),
        &["sync", "--pin", &server.key_id, "t", &url],
    );
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(said.contains("may not read on this server"), "{said}");
    assert!(
        server.served.path().join("t/old").exists() && !server.served.path().join("t/a").exists()
    );
}

#[test]
fn partials_are_removed_at_the_configured_age() {
    use haul::{LocalStore, PartialKey, Store};
    use std::time::{Duration, SystemTime};
    let served = tempfile::tempdir().unwrap();
    let store = LocalStore::open(served.path()).unwrap();
    let claim = PartialKey {
        owner: [7; 32],
        size: 100,
        modified: None,
    };
    for name in ["old", "young"] {
        store
            .create(
                &haul::RelativePath::from_components([name]).unwrap(),
                &claim,
            )
            .unwrap()
            .write_at(b"some", 0)
            .unwrap();
    }
    let partials = || fs_names(served.path());
    let [old, young] = &partials()[..] else {
        panic!("{:?}", partials())
    };
    // The order does not matter: their names are digests.
    let old = std::fs::File::options()
        .write(true)
        .open(served.path().join(old))
        .unwrap();
    old.set_modified(SystemTime::now() - Duration::from_secs(2 * 3600))
        .unwrap();
    drop(old);
    let home = private();
    let address = [
        "--listen",
        "127.0.0.1:0",
        "--anyone",
        "both",
        "--keep-partials",
        "1h",
    ];
    let mut serving = Command::new(env!("CARGO_BIN_EXE_haul"))
        .args(["serve", served.path().to_str().unwrap()])
        .args(address)
        .env("HAUL_HOME", home.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    while partials().len() > 1 {
        assert!(serving.try_wait().unwrap().is_none(), "it ended");
        std::thread::yield_now();
    }
    assert_eq!(&partials()[0], young);
    serving.kill().unwrap();
    serving.wait().unwrap();
}

fn fs_names(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A `haul send` that prints its code and port as JSON, and its output up to its end.
fn send(home: &Path, arguments: &[&str]) -> (std::process::Child, String, String) {
    let arguments = [&["send", "--json", "--listen", "127.0.0.1:0"], arguments].concat();
    let mut child = command(home, home, &arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.as_mut().unwrap());
    output.read_line(&mut line).unwrap();
    let told: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
    (
        child,
        told["code"].as_str().unwrap().to_owned(),
        format!("127.0.0.1:{}", told["port"]),
    )
}

#[test]
fn a_receiver_needs_only_the_code() {
    let (alice, bob, source, to) = (private(), private(), tempdir().unwrap(), tempdir().unwrap());
    write(&source.path().join("holiday/a"), b"a");
    let holiday = source.path().join("holiday");
    let (child, code, at) = send(alice.path(), &[holiday.to_str().unwrap()]);
    // As a user types it.
    let spoken = code.to_uppercase().replace('-', " ");
    let received = haul(
        bob.path(),
        to.path(),
        &["receive", "--yes", "--at", &at, &spoken],
    );
    assert_eq!(
        received.status.code(),
        Some(0),
        "{}",
        text(&received.stderr)
    );
    assert_eq!(std::fs::read(to.path().join("holiday/a")).unwrap(), b"a");
    assert!(
        text(&received.stderr).contains("holiday/  1 file, "),
        "{}",
        text(&received.stderr)
    );
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
}

#[test]
fn a_wrong_word_is_reported_at_both_ends() {
    let (alice, bob, source) = (private(), private(), tempdir().unwrap());
    write(&source.path().join("a"), b"a");
    let a = source.path().join("a");
    let (child, code, at) = send(alice.path(), &[a.to_str().unwrap()]);
    let (most, last) = code.rsplit_once('-').unwrap();
    let wrong = format!("{most}-{}", if last == "zoo" { "zone" } else { "zoo" });
    let guessed = haul(
        bob.path(),
        source.path(),
        &["receive", "--yes", "--at", &at, &wrong],
    );
    assert_eq!(guessed.status.code(), Some(4));
    assert!(
        text(&guessed.stderr).contains("ask for a new one"),
        "{}",
        text(&guessed.stderr)
    );
    let sent = child.wait_with_output().unwrap();
    assert_eq!(sent.status.code(), Some(4));
    assert!(
        text(&sent.stderr).contains("burnt the code"),
        "{}",
        text(&sent.stderr)
    );

    let (child, code, at) = send(alice.path(), &[a.to_str().unwrap()]);
    let asked = haul(bob.path(), bob.path(), &["receive", "--at", &at, &code]);
    assert_eq!(asked.status.code(), Some(2));
    assert!(
        text(&asked.stderr).contains("--yes"),
        "{}",
        text(&asked.stderr)
    );
    assert!(!bob.path().join("a").exists());
    // No peer was reached, so the code is still valid. Nothing is written into the directory with the keys; that too is
    // reported before any connection.
    let home = haul(
        bob.path(),
        bob.path(),
        &["receive", "--yes", "--at", &at, &code],
    );
    assert_eq!(home.status.code(), Some(2), "{}", text(&home.stderr));
    assert!(
        text(&home.stderr).contains("choose another directory"),
        "{}",
        text(&home.stderr)
    );
    let to = tempdir().unwrap();
    let received = haul(
        bob.path(),
        to.path(),
        &["receive", "--yes", "--at", &at, &code],
    );
    assert_eq!(
        received.status.code(),
        Some(0),
        "{}",
        text(&received.stderr)
    );
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));

    let unknown = haul(
        bob.path(),
        bob.path(),
        &["receive", "417-mapel-canyon-orbit"],
    );
    assert_eq!(unknown.status.code(), Some(2));
    assert!(
        text(&unknown.stderr).contains("mapel"),
        "{}",
        text(&unknown.stderr)
    );
}

#[test]
fn a_server_in_a_home_directory_hides_haul_home() {
    let (served, client) = (tempdir().unwrap(), client());
    let keys = served.path().join(".config/haul");
    std::fs::create_dir_all(&keys).unwrap();
    std::fs::set_permissions(&keys, PermissionsExt::from_mode(0o700)).unwrap();
    write(&served.path().join("notes"), b"notes");
    write(&client.files.path().join("authorized_keys"), b"SHA256:evil");
    // As `haul serve .` in that directory.
    let arguments = ["serve", ".", "--listen", "127.0.0.1:0", "--anyone", "both"];
    let mut child = command(&keys, served.path(), &arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    while !said.contains("Ctrl-C") {
        assert!(output.read_line(&mut said).unwrap() > 0, "it ended: {said}");
    }
    assert!(said.contains("  hides   "), "{said}");
    let word = |after: &str| {
        said.split(after)
            .nth(1)
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
    };
    let (url, id) = (word("  at "), word("key id "));
    let run = |arguments: &[&str]| {
        let mut all = vec![arguments[0], "--pin", id];
        let places = arguments[1..]
            .iter()
            .map(|argument| argument.replace("URL/", url));
        let places: Vec<String> = places.collect();
        all.extend(places.iter().map(String::as_str));
        haul(client.home.path(), client.files.path(), &all)
    };
    let key = run(&["cp", "URL/.config/haul/key.pem", "stolen"]);
    let all = run(&["cp", "URL/", "all/"]);
    let list = run(&["ls", "-R", "URL/"]);
    let written = run(&["cp", "authorized_keys", "URL/.config/haul/"]);
    let mode = std::fs::metadata(&keys).unwrap().permissions().mode() & 0o777;
    child.kill().unwrap();
    child.wait().unwrap();
    assert_ne!(key.status.code(), Some(0));
    assert!(
        text(&key.stderr).contains("keys and settings"),
        "{}",
        text(&key.stderr)
    );
    assert!(!client.files.path().join("stolen").exists());
    assert_eq!(all.status.code(), Some(0), "{}", text(&all.stderr));
    assert_eq!(
        fs_names(&client.files.path().join("all")),
        [".config", "notes"]
    );
    assert!(fs_names(&client.files.path().join("all/.config")).is_empty());
    assert!(
        !text(&list.stdout).contains("key.pem"),
        "{}",
        text(&list.stdout)
    );
    assert_ne!(written.status.code(), Some(0));
    assert!(!keys.join("authorized_keys").exists());
    assert_eq!(mode, 0o700);

    let inside = haul(&keys, &keys, &["serve", "--listen", "127.0.0.1:0"]);
    assert_eq!(inside.status.code(), Some(2), "{}", text(&inside.stderr));
}

#[test]
fn a_pull_or_receive_never_changes_haul_home() {
    let (server, alice) = (Serving::start(&["--anyone", "both"]), private());
    let home = tempdir().unwrap();
    let keys = home.path().join(".config/haul");
    write(
        &server.served.path().join(".config/haul/authorized_keys"),
        b"SHA256:evil",
    );
    write(&server.served.path().join(".config/other/file"), b"data");
    let tree = format!("{}.config", server.url);
    let pulled = haul(
        &keys,
        home.path(),
        &["cp", "--pin", &server.key_id, &tree, "."],
    );
    assert_eq!(pulled.status.code(), Some(1), "{}", text(&pulled.stderr));
    assert!(
        text(&pulled.stderr).contains("keys and settings"),
        "{}",
        text(&pulled.stderr)
    );
    assert!(!keys.join("authorized_keys").exists());
    assert!(
        home.path().join(".config/other/file").exists(),
        "the rest comes"
    );

    let offered = server.served.path().join(".config");
    let (child, code, at) = send(alice.path(), &[offered.to_str().unwrap()]);
    let received = haul(
        &keys,
        home.path(),
        &["receive", "--yes", "--at", &at, &code],
    );
    assert_eq!(
        received.status.code(),
        Some(1),
        "{}",
        text(&received.stderr)
    );
    assert!(text(&received.stderr).contains("a directory of that name exists"));
    let _ = child.wait_with_output().unwrap();
    assert!(!keys.join("authorized_keys").exists());

    // Receiving in the home directory itself works.
    write(&alice.path().join("notes"), b"notes");
    let (child, code, at) = send(alice.path(), &["notes"]);
    let received = haul(
        &keys,
        home.path(),
        &["receive", "--yes", "--at", &at, &format!("Code: {code}.")],
    );
    assert_eq!(
        received.status.code(),
        Some(0),
        "{}",
        text(&received.stderr)
    );
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(std::fs::read(home.path().join("notes")).unwrap(), b"notes");
}

#[test]
fn a_code_may_be_given_as_several_arguments_or_a_pasted_line() {
    let (alice, bob) = (private(), private());
    write(&alice.path().join("f"), b"f");
    for number in 0..3 {
        let (child, code, at) = send(alice.path(), &["f"]);
        let words: Vec<&str> = code.split('-').collect();
        let upper = code.to_uppercase();
        let pasted = match number {
            0 => words,
            1 => vec!["Code:", &upper],
            _ => vec!["haul", "receive", &code, " "],
        };
        let to = tempdir().unwrap();
        let arguments = [&["receive", "--yes", "--at", &at][..], &pasted].concat();
        let received = haul(bob.path(), to.path(), &arguments);
        assert_eq!(
            received.status.code(),
            Some(0),
            "{pasted:?}: {}",
            text(&received.stderr)
        );
        assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    }
}

#[test]
fn a_machines_name_cannot_control_a_terminal() {
    let evil = "\u{1b}]52;c;ZXZpbA==\u{7}\nFORGED\u{202e}";
    let (alice, bob, to) = (private(), private(), tempdir().unwrap());
    write(&alice.path().join(evil), b"x");
    write(&alice.path().join("other"), b"x");
    let (child, code, at) = send(alice.path(), &[evil, "other"]);
    let received = haul(
        bob.path(),
        to.path(),
        &["receive", "--yes", "-v", "--at", &at, &code],
    );
    let _ = child.wait_with_output().unwrap();
    let (child, code, at) = send(alice.path(), &[evil, "other"]);
    let json = haul(
        bob.path(),
        to.path(),
        &["receive", "--yes", "--json", "--at", &at, &code],
    );
    let _ = child.wait_with_output().unwrap();
    for said in [received.stderr, received.stdout, json.stderr, json.stdout] {
        let said = text(&said);
        let steers = |c: char| c != '\n' && c.is_control() || c == '\u{202e}';
        assert!(!said.contains(steers), "{said:?}");
        assert!(
            !said.lines().any(|line| line.starts_with("FORGED")),
            "{said:?}"
        );
    }
}
