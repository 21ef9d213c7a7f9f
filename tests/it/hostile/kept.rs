//! Peers that make a server keep something: names of a large directory, rules of planted trees and of requests, and
//! tables of paths. The memory of the server's process stays near that of a quiet run.

use bytes::BytesMut;
use haul::internal::protocol::{Hello, Message, Pull, Push, Ready, Refused, Verdict, WireFilter};
use haul::{Code, Config, Identity, Kind};

use crate::hostile::peer::*;
use crate::support::write;

/// A patient configuration with this memory for what sessions keep. With `HAUL_TEST_UNBOUNDED` in the environment there
/// is no bound, to see that these tests fail.
fn bounded(session_memory: usize) -> Config {
    let is_unbounded = std::env::var_os("HAUL_TEST_UNBOUNDED").is_some();
    Config {
        session_memory: if is_unbounded {
            1 << 40
        } else {
            session_memory
        },
        ..patient()
    }
}

/// The resident memory of this process, in KiB. Tests of other files may run in it, so a test here runs in a child
/// process of its own.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

/// Runs a test of this file alone in a child process, and returns whether this is that process.
fn in_own_process(name: &str) -> bool {
    const CHILD: &str = "HAUL_TEST_OWN_PROCESS";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&format!("hostile::kept::{name}"), "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    eprintln!("{said}");
    let errors = String::from_utf8_lossy(&output.stderr);
    eprintln!("{errors}");
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{name}"
    );
    false
}

/// Asserts that this process takes at most `limit` MiB more than in the quiet run, and shows how much.
fn assert_growth(quiet: usize, limit: usize) {
    let grown = resident().saturating_sub(quiet) / 1024;
    eprintln!("grown by {grown} MiB, at most {limit}");
    assert!(grown <= limit, "grown by {grown} MiB, more than {limit}");
}

/// A pull that is ready and then never answered.
async fn unanswered(peer: &Peer, request: &[u8]) -> impl Sized + use<> {
    let (_, control, mut answers) = peer.ask(request).await;
    within(answers.read::<Hello>()).await.unwrap();
    within(answers.read::<Ready>()).await.unwrap();
    let (send, mut receive) = within(peer.connection.accept_bi()).await.unwrap();
    // The first entries show that the walk runs.
    let mut first = [0; 64];
    within(receive.read_exact(&mut first)).await.unwrap();
    (control, answers, send, receive)
}

fn gitignore_pull() -> Vec<u8> {
    pull_with(WireFilter {
        rules: Vec::new(),
        gitignore: true,
    })
}

fn pull_with(filter: WireFilter) -> Vec<u8> {
    Pull {
        session: [7; 16],
        sources: vec![components(&[b"d"])],
        entries: 10_000,
        entry_bytes: 1 << 20,
        limit: None,
        checksum: None,
        follow: None,
        filter: Some(filter),
        xattrs: None,
        owner: None,
        growing: None,
    }
    .to_bytes()
    .to_vec()
}

/// Rules that take much memory when they are compiled: 1,000 lines of wildcards, all of them different.
fn costly_rules(bytes: usize, seed: u64) -> Vec<Vec<u8>> {
    let mut noise = Noise::new(seed);
    let mut rules = Vec::new();
    let mut used = 0;
    while used + 17 <= bytes && rules.len() < 1_000 {
        let rule: Vec<u8> = (0..8)
            .flat_map(|_| [b'?', b'a' + noise.below(26) as u8])
            .collect();
        used += rule.len() + 1;
        rules.push(rule);
    }
    rules
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unanswered_pulls_keep_few_names_of_a_large_directory() {
    if !in_own_process("unanswered_pulls_keep_few_names_of_a_large_directory") {
        return;
    }
    let arena = Arena::new(bounded(128 << 20));
    let directory = arena.served().join("d");
    std::fs::create_dir(&directory).unwrap();
    for n in 0..100_000 {
        std::fs::write(directory.join(format!("{n:0100}")), b"").unwrap();
    }
    let request = pull_of(&[&[b"d"]], 10_000);
    let first = Peer::connect(&arena.host).await;
    let quiet_pull = unanswered(&first, &request).await;
    let quiet = resident();
    let identity = Identity::generate().unwrap();
    let mut hostile = Vec::new();
    for _ in 0..8 {
        let peer = Peer::connect_as(&arena.host, &identity, |_| {}).await;
        let mut pulls = Vec::new();
        for _ in 0..6 {
            pulls.push(unanswered(&peer, &request).await);
        }
        hostile.push((peer, pulls));
    }
    // 48 pulls of 15 MB of names each took 700 MiB. The client's ends of the connections are in this process too.
    assert_growth(quiet, 100);
    drop((hostile, quiet_pull));
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_of_a_planted_tree_are_bounded_and_the_rest_is_sent() {
    if !in_own_process("rules_of_a_planted_tree_are_bounded_and_the_rest_is_sent") {
        return;
    }
    let arena = Arena::new(bounded(128 << 20));
    let mut directory = arena.served().join("d");
    write(&directory.join("z"), b"after the deep tree");
    for level in 0..40 {
        directory.push("l");
        let mut text = Vec::new();
        for seed in 0..2 {
            let rules = costly_rules(17_000, level * 100 + seed);
            text.extend(rules.join(&b'\n'));
            text.push(b'\n');
        }
        write(&directory.join(".gitignore"), &text);
    }
    arena.honest().await;
    let quiet = resident();
    let peer = Peer::connect(&arena.host).await;
    let (_, _control, mut answers) = peer.ask(&gitignore_pull()).await;
    within(answers.read::<Hello>()).await.unwrap();
    within(answers.read::<Ready>()).await.unwrap();
    let (_send, mut receive) = within(peer.connection.accept_bi()).await.unwrap();
    let mut all = Vec::new();
    let mut most = 0;
    // Nothing is answered; the file behind the deep tree shows that the walk went on.
    while !all.windows(2).any(|pair| pair == b"Az" || pair == b"az") {
        let chunk = within(receive.read_chunk(1 << 16, true)).await.unwrap();
        all.extend_from_slice(&chunk.expect("the manifest goes on").bytes);
        most = most.max(resident());
    }
    eprintln!("most: grown by {} MiB", most.saturating_sub(quiet) / 1024);
    assert!(
        all.windows(20).any(|text| text == b"take too much memory"),
        "the directory fails with a reason"
    );
    assert_growth(quiet, 64);
    assert!(most.saturating_sub(quiet) / 1024 <= 96);
    arena.unharmed().await;
}

/// A push of one directory with these rules.
fn push_with(rules: &[Vec<u8>], number: u8) -> Vec<u8> {
    let push = Push {
        session: [number; 16],
        destination: components(&[]),
        into: true,
        sources: 1,
        directory: true,
        durability: haul::Durability::Visible,
        take: None,
        filter: Some(WireFilter {
            rules: rules.iter().map(|rule| rule.clone().into()).collect(),
            gitignore: false,
        }),
        origin: None,
    };
    push.to_bytes().to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_of_requests_take_bounded_memory() {
    if !in_own_process("rules_of_requests_take_bounded_memory") {
        return;
    }
    let arena = Arena::new(bounded(128 << 20));
    write(&arena.served().join("d/f"), b"");
    arena.honest().await;
    let quiet = resident();
    let mut hostile = Vec::new();
    let mut refused = 0;
    for n in 0..20_u8 {
        let peer = Peer::connect(&arena.host).await;
        let mut sessions = Vec::new();
        for m in 0..8_u8 {
            let rules = costly_rules(15_000, u64::from(n) * 8 + u64::from(m));
            let request = if m % 2 == 0 {
                push_with(&rules, n * 8 + m)
            } else {
                pull_with(WireFilter {
                    rules: rules.into_iter().map(Into::into).collect(),
                    gitignore: false,
                })
            };
            let (_, control, mut answers) = peer.ask(&request).await;
            within(answers.read::<Hello>()).await.unwrap();
            let answer = within(answers.frame(Ready::LIMIT)).await.unwrap().unwrap();
            if answer.kind == Refused::TYPE {
                let why = answer.decode::<Refused>().unwrap().why;
                assert_eq!(haul::Reason::from(why).code, Code::Unsupported);
                refused += 1;
            }
            sessions.push((control, answers));
        }
        hostile.push((peer, sessions));
    }
    eprintln!("{refused} of 160 were refused");
    assert_growth(quiet, 150);
    drop(hostile);
    arena.unharmed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_the_memory_further_names_become_files_of_their_own() {
    use std::os::unix::fs::MetadataExt;
    let arena = Arena::new(bounded(1 << 20));
    let peer = Peer::connect(&arena.host).await;
    let mut push = peer.session().await;
    let empty = |id: u64, name: String, first: u64| {
        let mut entry = entry(id, &[name.as_bytes()], Kind::File);
        entry.size = Some(0);
        entry.hard_link = Some(first);
        entry
    };
    const FILES: u64 = 3_000;
    for chunk in 0..FILES / 250 {
        let mut entries = BytesMut::new();
        for id in chunk * 250..(chunk + 1) * 250 {
            empty(id, format!("f{id:06}"), id).put(&mut entries);
        }
        within(push.manifest.write_all(&entries)).await.unwrap();
        for _ in 0..250 {
            push.verdict().await;
        }
    }
    let names = [(FILES, 0), (FILES + 1, FILES - 1)];
    for (id, first) in names {
        push.announce(&empty(id, format!("name-{first}"), first))
            .await;
        assert_eq!(push.verdict().await, Verdict::Done(id));
    }
    let links = |first: u64| {
        let name = arena.served().join(format!("name-{first}"));
        name.metadata().unwrap().nlink()
    };
    assert_eq!(links(0), 2, "the first files are remembered");
    assert_eq!(links(FILES - 1), 1, "the last one does not fit");
    drop(push);
    arena.unharmed().await;
}
