//! Containers that were started in other ways than the plain one: each goes out with one engine and comes
//! home with the other, with a client connected.

mod lab;

use lab::pair::{Pair, assert_went_on, report};
use lab::{IMAGE, Lab};

/// A way of starting a container, and how one sees, from inside, that it is still as it was.
struct Way {
    name: &'static str,
    podman: &'static [&'static str],
    /// A line of shell that prepares something.
    prepare: &'static str,
    /// One whose words must be the same before and after.
    look: &'static str,
}

/// Each has many options at once: a move takes longer than looking at what they do.
const WAYS: &[Way] = &[
    Way {
        name: "attended",
        podman: &[
            "--init",
            "--init-path=/usr/bin/catatonit",
            "--tty",
            "--interactive",
            "--hostname=someone",
            "--add-host=peer:10.1.2.3",
            "--dns=10.1.2.4",
            "--restart=always",
            "--stop-signal=USR1",
            "--env=WHO=me",
        ],
        prepare: "",
        look: "readlink /proc/1/fd/0; tr '\\0' ' ' </proc/1/cmdline
               set -- $(cat /proc/1/task/1/children); echo $1
               tr '\\0' ' ' </proc/$1/cmdline; tr '\\0' '\\n' </proc/$1/environ | grep WHO
               hostname; grep peer /etc/hosts; cat /etc/resolv.conf",
    },
    Way {
        name: "confined",
        podman: &[
            "--read-only",
            "--tmpfs=/scratch:size=16m,mode=1777",
            "--shm-size=32m",
            "--ulimit=nofile=512:1024",
            "--ulimit=core=0:0",
            "--cap-drop=all",
            "--security-opt=no-new-privileges",
        ],
        prepare: "for at in /tmp /scratch /dev/shm; do mkdir $at/below; echo kept >$at/below/file; done",
        look: "cat /tmp/below/file /scratch/below/file /dev/shm/below/file
               df -k /scratch /dev/shm | awk '{ print $2, $6 }'
               touch /data/no 2>&1 || true
               grep -e 'open files' -e 'core file' /proc/1/limits
               grep -e Cap -e NoNewPrivs -e Seccomp: /proc/1/status",
    },
];

/// Moves one there and back. What goes wrong is a panic.
async fn there_and_back(pair: &Pair, way: &Way, port: &str) {
    let source = pair.host(1);
    let publish = format!("{port}:{port}");
    let run = ["podman", "run", "-d", "--name", way.name, "-p", &publish];
    source
        .exec(&[&run[..], way.podman, &[IMAGE, "echo", port]].concat())
        .await;
    let inside = async |host: usize, script: &str| {
        let command = ["podman", "exec", way.name, "busybox", "sh", "-ec", script];
        pair.host(host).exec(&command).await.text().to_owned()
    };
    // It runs once it answers.
    let client = pair
        .client(1)
        .spawn(&["client-echo", &source.ip(), port])
        .await;
    inside(1, way.prepare).await;
    let before = inside(1, way.look).await;
    for (from, to, engine) in [(1, 2, "rest"), (2, 1, "direct")] {
        let output = pair
            .try_migrate(way.name, from, to, &["--engine", engine])
            .await;
        assert!(
            output.status.success(),
            "{} with {engine}: {output}",
            way.name
        );
        pair.assert_moved(way.name, from, to, &report(&output))
            .await;
        assert_eq!(
            inside(to, way.look).await,
            before,
            "{} after {engine}",
            way.name
        );
    }
    assert_went_on(&client.stop().await, 1);
    source
        .exec(&["podman", "rm", "-f", "-t", "1", way.name])
        .await;
}

async fn all_of(ways: &'static [Way], runtime: &str) {
    let pair = std::sync::Arc::new(Pair::direct(Lab::builder(2).runtime(runtime)).await);
    let mut failed = Vec::new();
    for (index, way) in ways.iter().enumerate() {
        let port = (7000 + index).to_string();
        let on = pair.clone();
        // One that fails does not keep the others from being looked at.
        let moved = tokio::spawn(async move { there_and_back(&on, way, &port).await });
        match moved.await {
            Ok(()) => println!("{}: moved", way.name),
            Err(_) => failed.push(way.name),
        }
    }
    assert!(failed.is_empty(), "these did not move well: {failed:?}");
    let pair = std::sync::Arc::into_inner(pair).expect("nobody else has it");
    pair.down().await;
}

#[tokio::test]
async fn under_runc() {
    all_of(WAYS, "runc").await;
}

#[tokio::test]
async fn under_crun() {
    all_of(WAYS, "crun").await;
}
