//! The congestion controller on links in virtual time: all of quinn except its sockets. The rates and delays asserted
//! here are the same on every machine.

use std::time::{Duration, Instant};

use crate::support::link::{Link, Network};
use haul::Congestion;

const MEGABYTE: u64 = 1_000_000;

/// The result of a single transfer, in the terms of benches/README.md.
#[derive(Debug)]
struct Figures {
    seconds: f64,
    goodput_of_limit: f64,
    waste: f64,
    mean_rtt: f64,
}

/// Sends this many bytes over a link, without other flows.
fn alone(link: Link, congestion: Congestion, bytes: u64) -> Figures {
    let (rate, rtt) = (link.rate, link.delay.as_secs_f64() * 2.0);
    let mut network = Network::new(link);
    let flow = network.flow(congestion, bytes, 0.0);
    network.run(1000.0);
    let seconds = network.seconds(flow).expect("it never ended");
    let counts = network.counts();
    let arrives = 1.0 - counts.lost as f64 / counts.packets as f64;
    Figures {
        seconds,
        goodput_of_limit: bytes as f64 * 8.0 / seconds / (rate * arrives * 0.947),
        waste: counts.bytes as f64 * 0.947 * arrives / bytes as f64 - 1.0,
        mean_rtt: 1.0 + counts.mean_queue() / rtt,
    }
}

#[track_caller]
fn assert_good(link: Link, bytes: u64, goodput: f64, waste: f64, rtt: f64) {
    let figures = alone(link, Congestion::Haul, bytes);
    assert!(figures.goodput_of_limit >= goodput, "{figures:?}");
    assert!(figures.waste <= waste, "{figures:?}");
    assert!(figures.mean_rtt <= rtt, "{figures:?}");
}

#[test]
fn random_loss_leaves_the_link_full_and_its_queue_short() {
    for loss in [0.0, 0.001, 0.01, 0.05] {
        assert_good(
            Link::new(40.0, 40).loss(loss),
            30 * MEGABYTE,
            0.93,
            0.02,
            1.25,
        );
    }
    for loss in [0.1, 0.2] {
        assert_good(
            Link::new(40.0, 40).loss(loss),
            30 * MEGABYTE,
            0.90,
            0.03,
            1.25,
        );
    }
}

#[test]
fn cubic_nearly_stops_on_the_same_lossy_link() {
    let figures = alone(
        Link::new(40.0, 40).loss(0.01),
        Congestion::Cubic,
        2 * MEGABYTE,
    );
    assert!(figures.goodput_of_limit < 0.25, "{figures:?}");
}

#[test]
fn loss_in_bursts_is_treated_as_random_loss() {
    assert_good(
        Link {
            burst: (0.005, 0.25),
            ..Link::new(50.0, 40)
        },
        30 * MEGABYTE,
        0.90,
        0.03,
        1.3,
    );
}

#[test]
fn jitter_that_reorders_packets_does_not_reduce_the_rate() {
    assert_good(
        Link {
            jitter: Duration::from_millis(10),
            ..Link::new(50.0, 60)
        },
        40 * MEGABYTE,
        0.90,
        0.03,
        1.4,
    );
}

#[test]
fn a_satellite_link_is_filled_within_some_round_trips() {
    assert_good(
        Link::new(20.0, 600).loss(0.01),
        40 * MEGABYTE,
        0.80,
        0.03,
        1.3,
    );
}

#[test]
fn a_shallow_queue_is_not_flooded() {
    assert_good(
        Link {
            queue: 16e3,
            ..Link::new(10.0, 50)
        },
        12 * MEGABYTE,
        0.85,
        0.05,
        2.0,
    );
}

#[test]
fn a_return_path_with_a_hundredth_of_the_rate_suffices() {
    let mut network = Network::new(Link::new(50.0, 50).loss(0.005));
    network.change_back(|back| back.rate = 0.5e6);
    let flow = network.flow(Congestion::Haul, 1000 * MEGABYTE, 0.0);
    network.run(10.0);
    assert!(
        network.rate(flow, 4.0, 10.0) > 0.85 * 0.947 * 50e6,
        "{}",
        network.rate(flow, 4.0, 10.0)
    );
}

#[test]
fn two_transfers_share_equally_and_keep_the_queue_short() {
    let mut network = Network::new(Link::new(40.0, 50));
    let flows = [0, 1].map(|_| network.flow(Congestion::Haul, 1000 * MEGABYTE, 0.0));
    network.run(20.0);
    let rates = flows.map(|flow| network.rate(flow, 0.0, 20.0));
    let jain = (rates[0] + rates[1]).powi(2) / (rates[0].powi(2) + rates[1].powi(2)) / 2.0;
    assert!(jain >= 0.95, "{jain} of {rates:?}");
    assert!(rates[0] + rates[1] > 0.85 * 40e6, "{rates:?}");
    assert!(
        network.counts().mean_queue() < 0.3 * 0.050,
        "{:?}",
        network.counts()
    );
}

#[test]
fn beside_cubic_neither_flow_starves() {
    let mut network = Network::new(Link::new(60.0, 50));
    let flows = [Congestion::Haul, Congestion::Cubic]
        .map(|congestion| network.flow(congestion, 1000 * MEGABYTE, 0.0));
    network.run(35.0);
    let rates = flows.map(|flow| network.rate(flow, 5.0, 35.0));
    assert!(
        rates.iter().all(|rate| *rate > 0.25 * 0.94 * 60e6),
        "{rates:?}"
    );
}

#[test]
fn a_late_flow_gets_a_share_where_cubic_filled_the_queue() {
    let mut network = Network::new(Link::new(50.0, 50));
    let cubic = network.flow(Congestion::Cubic, 1000 * MEGABYTE, 0.0);
    let late = network.flow(Congestion::Haul, 1000 * MEGABYTE, 10.0);
    network.run(40.0);
    let rates = [
        network.rate(late, 0.0, 30.0),
        network.rate(cubic, 10.0, 40.0),
    ];
    assert!(
        rates.iter().all(|rate| *rate > 0.2 * 0.94 * 50e6),
        "{rates:?}"
    );
}

#[test]
fn eight_transfers_on_one_uplink_neither_flood_nor_starve() {
    let mut network = Network::new(Link::new(50.0, 50));
    let flows: Vec<_> = (0..8)
        .map(|i| network.flow(Congestion::Haul, 1000 * MEGABYTE, f64::from(i) * 0.7))
        .collect();
    network.run(22.0);
    let begins = |i: usize| i as f64 * 0.7;
    let rates: Vec<_> = flows
        .iter()
        .enumerate()
        .map(|(i, &flow)| network.rate(flow, 10.0 - begins(i), 22.0 - begins(i)))
        .collect();
    let counts = network.counts();
    assert!(counts.overflowed * 20 < counts.packets, "{counts:?}");
    assert!(
        rates.iter().all(|rate| *rate > 50e6 / 8.0 / 5.0),
        "{rates:?}"
    );
}

#[test]
fn a_fall_of_the_rate_is_followed_within_two_seconds() {
    let mut network = Network::new(Link::new(50.0, 50));
    let flow = network.flow(Congestion::Haul, 1000 * MEGABYTE, 0.0);
    network.change(5.0, |link| link.rate = 10e6);
    network.run(7.0);
    let before = network.counts().clone();
    network.run(12.0);
    let after = network.counts();
    let queue = (after.queued - before.queued) / (after.let_in - before.let_in) as f64;
    assert!(queue < 0.3 * 0.050, "{queue} s of queue");
    assert!(network.rate(flow, 7.0, 12.0) > 0.85 * 10e6);
}

#[test]
fn more_rate_and_a_longer_path_are_found_in_some_round_trips() {
    let mut network = Network::new(Link {
        queue: 1e6,
        ..Link::new(10.0, 50)
    });
    let flow = network.flow(Congestion::Haul, 1000 * MEGABYTE, 0.0);
    network.change(5.0, |link| link.rate = 50e6);
    network.change(8.0, |link| link.delay *= 3);
    network.run(13.0);
    assert!(
        network.rate(flow, 6.0, 8.0) > 0.85 * 50e6,
        "rate {}",
        network.rate(flow, 6.0, 8.0)
    );
    assert!(
        network.rate(flow, 10.0, 13.0) > 0.80 * 50e6,
        "path {}",
        network.rate(flow, 10.0, 13.0)
    );
}

#[test]
fn after_a_blackout_the_rate_comes_back() {
    let mut network = Network::new(Link::new(40.0, 50));
    let flow = network.flow(Congestion::Haul, 1000 * MEGABYTE, 0.0);
    network.change(3.0, |link| link.dark = true);
    network.change(6.0, |link| link.dark = false);
    network.run(16.0);
    assert!(
        network.rate(flow, 12.0, 16.0) > 0.85 * 40e6,
        "{}",
        network.rate(flow, 12.0, 16.0)
    );
}

/// Prints the table of benches/README.md as simulated, without sessions and disks: `cargo test --release --test it
/// congestion:: -- --ignored --nocapture`. ROW=text selects rows.
#[test]
#[ignore = "prints a table; takes some 20 s in a release build"]
fn table() {
    let clean = || Link::new(100.0, 100);
    let rows = [
        ("100 Mbit/s, 100 ms", clean(), 268),
        ("100 Mbit/s, 100 ms, 0.1 %", clean().loss(0.001), 268),
        ("100 Mbit/s, 100 ms, 1 %", clean().loss(0.01), 268),
        ("100 Mbit/s, 100 ms, 5 %", clean().loss(0.05), 268),
        ("100 Mbit/s, 100 ms, 10 %", clean().loss(0.1), 268),
        ("100 Mbit/s, 100 ms, 20 %", clean().loss(0.2), 268),
        (
            "300 Mbit/s, 30 ms, 1 %",
            Link::new(300.0, 30).loss(0.01),
            268,
        ),
        (
            "20 Mbit/s, 600 ms, 1 %",
            Link::new(20.0, 600).loss(0.01),
            67,
        ),
        (
            "50 Mbit/s, 40 ms, bursts",
            Link {
                burst: (0.005, 0.25),
                ..Link::new(50.0, 40)
            },
            268,
        ),
        (
            "50 Mbit/s, 60 ms, jitter",
            Link {
                jitter: Duration::from_millis(10),
                ..Link::new(50.0, 60)
            },
            268,
        ),
        (
            "1 Gbit/s, 100 ms, 0.1 %",
            Link::new(1000.0, 100).loss(0.001),
            1074,
        ),
        (
            "10 Mbit/s, 50 ms, 16 KB",
            Link {
                queue: 16e3,
                ..Link::new(10.0, 50)
            },
            268,
        ),
    ];
    let only = std::env::var("ROW").unwrap_or_default();
    for (name, link, megabytes) in rows.into_iter().filter(|(name, ..)| name.contains(&only)) {
        let clock = Instant::now();
        let Figures {
            seconds,
            goodput_of_limit,
            waste,
            mean_rtt,
        } = alone(link, Congestion::Haul, megabytes * MEGABYTE);
        println!(
            "{name:26} {seconds:7.2} s  {goodput_of_limit:.3} of limit  waste {:5.2} %  RTT {mean_rtt:.3}  ({:.1} s)",
            waste * 100.0,
            clock.elapsed().as_secs_f64(),
        );
    }
}

/// Prints the shares of a link that haul and another flow get in the 30 s after the later one began: `cargo test
/// --release --test it congestion:: -- --ignored --nocapture shares`.
#[test]
#[ignore = "prints a table; takes some 20 s in a release build"]
fn shares() {
    for (rate, rtt, queue) in [
        (100.0, 50, 1.0),
        (100.0, 50, 2.0),
        (50.0, 20, 1.0),
        (20.0, 100, 1.0),
        (300.0, 30, 1.0),
    ] {
        for other in [Congestion::Cubic, Congestion::Haul] {
            for (haul, its) in [(0.0, 0.0), (5.0, 0.0), (20.0, 0.0), (0.0, 5.0), (0.0, 20.0)] {
                let link = Link::new(rate, rtt);
                let mut network = Network::new(Link {
                    queue: link.queue * queue,
                    ..link
                });
                let flows = [(Congestion::Haul, haul), (other, its)];
                let flows = flows.map(|(congestion, begins)| {
                    (network.flow(congestion, 10_000 * MEGABYTE, begins), begins)
                });
                let both = f64::max(haul, its);
                network.run(both + 30.0);
                let parts = |from: f64| {
                    flows.map(|(flow, begins)| {
                        network.rate(flow, both + from - begins, both + 30.0 - begins)
                            / rate
                            / 0.947e6
                    })
                };
                let (parts, late) = (parts(0.0), parts(15.0));
                println!(
                    "{rate:4} Mbit/s {rtt:3} ms {queue} BDP  haul at {haul:2} s {:.2} ({:.2})  {other} at {its:2} s {:.2} ({:.2})",
                    parts[0], late[0], parts[1], late[1]
                );
            }
        }
    }
}
