//! The direct engine: livemig between Podman and its runtime.

mod lab;

use std::time::Duration;

use lab::pair::{self, Pair, assert_went_on};
use lab::{Lab, link};

/// A busy connection, and one that is silent from before the move until after it.
async fn busy_and_idle(runtime: &str) {
    let pair = Pair::direct(Lab::builder(2).runtime(runtime)).await;
    let (h1, c1) = (pair.host(1), pair.client(1));
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let client = c1
        .spawn(&["client-echo", &h1.ip(), "7000", "--idle", "1"])
        .await;
    let report = pair.migrate("web", 1, 2).await;
    println!("{report:#}");
    pair.assert_moved("web", 1, 2, &report).await;
    assert_eq!(report["engine"], "direct", "{report}");
    assert_went_on(&client.stop().await, 2);
    pair.down().await;
}

#[tokio::test]
async fn a_busy_and_an_idle_one_go_on_under_runc() {
    busy_and_idle("runc").await;
}

#[tokio::test]
async fn a_busy_and_an_idle_one_go_on_under_crun() {
    busy_and_idle("crun").await;
}

/// 64 MiB of which some is written to all the time: every page arrives, and none that is out of date.
async fn memory_arrives(runtime: &str, more: &[&str]) {
    let pair = Pair::direct(Lab::builder(2).runtime(runtime)).await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    h1.run_workload("web", &["-p", "7000:7000"], &["touch", "64", "10", "7000"])
        .await;
    let client = c1.spawn(&["client-echo", &h1.ip(), "7000"]).await;
    let output = pair.try_migrate("web", 1, 2, more).await;
    assert!(output.status.success(), "{output}");
    let report = pair::report(&output);
    pair.assert_moved("web", 1, 2, &report).await;
    assert_eq!(report["engine"], "direct", "{report}");
    println!("{:#}", report["breakdown"]);
    let memory = c1.ask(h2.address(), 7000, "memory").await;
    assert_eq!(memory["pages"], 64 * 256, "{memory}");
    assert_eq!(memory["wrong"], 0, "{memory}");
    assert_eq!(memory["stale"], 0, "{memory}");
    assert_went_on(&client.stop().await, 1);
    assert!(report["bytes_sent"].as_u64() > Some(64 << 20), "{report}");
    for host in [h1, h2] {
        let left = host
            .sh("find /dev/shm/livemig-* /run/livemig/runtime/* 2>/dev/null || true")
            .await;
        assert_eq!(left.text(), "", "{left}");
    }
    pair.down().await;
}

#[tokio::test]
async fn memory_arrives_under_runc() {
    memory_arrives("runc", &[]).await;
}

#[tokio::test]
async fn memory_arrives_under_crun() {
    memory_arrives("crun", &[]).await;
}

#[tokio::test]
async fn memory_arrives_after_the_move_under_runc() {
    memory_arrives("runc", &["--post-copy"]).await;
}

#[tokio::test]
async fn memory_arrives_after_the_move_under_crun() {
    memory_arrives("crun", &["--post-copy"]).await;
}

/// A program that appends a number to three files, one after the other, as fast as it can: whatever of them
/// did not cross is a gap.
#[tokio::test]
async fn what_is_written_until_it_is_frozen_arrives() {
    const LOOP: &str = "i=0; while :; do i=$((i+1)); echo $i >>/data/log; echo $i >>/dev/shm/log; \
                        echo $i >>/volume/log; sleep 0.001; done";
    let pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2) = (pair.host(1), pair.host(2));
    let run = ["podman", "run", "-d", "--name", "web", "-v", "kept:/volume"];
    let program = ["--entrypoint", "/bin/sh", lab::IMAGE, "-c", LOOP];
    h1.exec(&[&run[..], &program].concat()).await;
    h1.sh("until podman exec web grep -q 200 /data/log; do sleep 0.05; done")
        .await;
    let report = pair.migrate("web", 1, 2).await;
    assert_eq!(report["engine"], "direct", "{report}");
    h2.exec(&["podman", "stop", "-t", "0", "web"]).await;
    h2.exec(&["podman", "start", "web"]).await;
    for file in ["/data/log", "/volume/log"] {
        let log = h2.exec(&["podman", "exec", "web", "cat", file]).await;
        let numbers = log
            .text()
            .lines()
            .filter_map(|line| line.parse::<u64>().ok());
        // It counts from 1 again when it is started anew.
        let numbers: Vec<u64> = numbers.collect();
        let whole = numbers
            .windows(2)
            .all(|two| two[1] == two[0] + 1 || two[1] == 1);
        assert!(whole && numbers.len() > 200, "{file}: {log}");
    }
    pair.down().await;
}

/// Over a link that is slower than the compressor what can be compressed is: 48 MiB of text in a volume.
#[tokio::test]
async fn what_gets_shorter_crosses_a_slow_link_compressed() {
    const MIB: u64 = 48;
    let pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2) = (pair.host(1), pair.host(2));
    let fill = format!(
        "podman volume create kept
        yes 'all of this is text' | head -c {MIB}M >$(podman volume inspect -f '{{{{.Mountpoint}}}}' kept)/text"
    );
    h1.sh(&fill).await;
    h1.run_workload("web", &["-v", "kept:/volume"], &["echo", "7000"])
        .await;
    let sum = "sha256sum <$(podman volume inspect -f '{{.Mountpoint}}' kept)/text";
    let before = h1.sh(sum).await;
    link::narrow(pair.lab().wan(), "200mbit").await;
    let report = pair.migrate("web", 1, 2).await;
    link::mend(pair.lab().wan()).await;
    assert_eq!(report["engine"], "direct", "{report}");
    assert_eq!(h2.sh(sum).await.text(), before.text());
    // What goes before it is clear that the link is slow, and what does not get shorter.
    let sent = report["bytes_sent"].as_u64();
    assert!(sent < Some(MIB << 19), "{sent:?} of {MIB} MiB");
    pair.down().await;
}

/// Podman goes on as before; what runs already can be moved; and nothing is left in the end.
#[tokio::test]
async fn the_set_up_comes_and_goes() {
    let pair = Pair::of(Lab::builder(2)).await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    let before = h1.sh("find /etc/containers /var/lib/livemig | sort").await;
    h1.run_workload("old", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    for host in [h1, h2] {
        let first = host.exec(&["livemig", "setup"]).await;
        assert!(first.text().contains("restart"), "{first}");
        let second = host.exec(&["livemig", "setup"]).await;
        assert!(second.text().contains("already"), "{second}");
        // Not before Podman's service has read it.
        let refused = pair.try_migrate("old", 1, 2, &["--engine", "direct"]).await;
        assert_eq!(refused.status.code(), Some(3), "{refused}");
        assert!(
            refused.to_string().contains("engine-unavailable"),
            "{refused}"
        );
        host.podman_service("restart").await;
    }

    // Podman by itself: nobody waits for these calls.
    h1.run_workload("new", &[], &["echo", "7001"]).await;
    let said = h1
        .exec(&["podman", "exec", "new", "/bin/sh", "-c", "echo here"])
        .await;
    assert_eq!(said.text(), "here");
    h1.exec(&["podman", "container", "checkpoint", "new"]).await;
    h1.exec(&["podman", "container", "restore", "new"]).await;
    assert_eq!(h1.container_state("new").await.as_deref(), Some("running"));
    h1.exec(&["podman", "rm", "-f", "-t", "0", "new"]).await;
    let info = ["podman", "info", "--format", "{{.Host.OCIRuntime.Name}}"];
    assert_eq!(h1.exec(&info).await.text(), "runc");

    // What was started before.
    let client = c1.spawn(&["client-echo", &h1.ip(), "7000"]).await;
    let report = pair.migrate("old", 1, 2).await;
    assert_eq!(report["engine"], "direct", "{report}");
    assert_went_on(&client.stop().await, 1);

    // Away again, while a container runs that was restored by it.
    for host in [h1, h2] {
        host.exec(&["livemig", "setup", "--remove"]).await;
        let second = host.exec(&["livemig", "setup", "--remove"]).await;
        assert!(second.text().contains("nothing"), "{second}");
        host.podman_service("restart").await;
    }
    let said = h2
        .exec(&["podman", "exec", "old", "/bin/sh", "-c", "echo here"])
        .await;
    assert_eq!(said.text(), "here");
    h2.exec(&["podman", "rm", "-f", "-t", "0", "old"]).await;
    let after = h1.sh("find /etc/containers /var/lib/livemig | sort").await;
    let made: Vec<&str> = after
        .text()
        .lines()
        .filter(|line| !before.text().lines().any(|old| old == *line))
        // Where drop-ins go is Podman's, and stays.
        .filter(|line| !line.ends_with("containers.conf.d") && !line.contains("journal"))
        .collect();
    assert_eq!(made, [""; 0], "{after}");

    // Somebody else's file of that name stays as it is.
    h1.sh("echo '# mine' >/etc/containers/containers.conf.d/90-livemig.conf")
        .await;
    for command in [&["livemig", "setup"][..], &["livemig", "setup", "--remove"]] {
        let refused = h1.try_exec(command).await;
        assert!(!refused.status.success(), "{refused}");
        assert!(refused.to_string().contains("90-livemig.conf"), "{refused}");
    }
    pair.down().await;
}

/// Whatever phase it is undone in, the container goes on at the source, and nothing is left on either host.
#[tokio::test]
async fn a_rehearsal_leaves_nothing() {
    let pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    h1.run_workload("web", &["-p", "7000:7000"], &["touch", "16", "10", "7000"])
        .await;
    // The other host gets Podman's network and its rules by the first container.
    pair.settled(2, &["-p", "7000:7000"]).await;
    let client = c1.spawn(&["client-echo", &h1.ip(), "7000"]).await;
    // Directories and locks that the first one makes stay.
    pair.try_migrate("web", 1, 2, &["--rehearse", "restore"])
        .await;
    let before = [h1.census().await, h2.census().await];
    for more in [&[][..], &["--post-copy"]] {
        for phase in [
            "prepare", "precopy", "hold", "freeze", "transfer", "restore",
        ] {
            let command = [&["--engine", "direct", "--rehearse", phase], more].concat();
            let output = pair.try_migrate("web", 1, 2, &command).await;
            assert_eq!(output.status.code(), Some(0), "{phase} {more:?}: {output}");
            for (host, before) in [h1, h2].into_iter().zip(&before) {
                host.assert_as_before(before).await;
            }
        }
    }
    let memory = c1.ask(h1.address(), 7000, "memory").await;
    assert_eq!(
        (&memory["wrong"], &memory["stale"]),
        (&0.into(), &0.into()),
        "{memory}"
    );
    assert_went_on(&client.stop().await, 1);
    pair.down().await;
}

/// Podman waits four minutes for its runtime. The content of a volume may take longer than that: it comes before
/// Podman knows of the container.
#[tokio::test]
async fn nobody_waits_for_the_content_of_a_volume() {
    let pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2) = (pair.host(1), pair.host(2));
    h1.run_workload("web", &["-v", "big:/big"], &["echo", "7000"])
        .await;
    let digest =
        "sha256sum $(podman volume inspect -f '{{.Mountpoint}}' big)/content | cut -d ' ' -f 1";
    h1.sh("head -c 12M /dev/urandom >$(podman volume inspect -f '{{.Mountpoint}}' big)/content")
        .await;
    let before = h1.sh(digest).await;
    // 12 MiB take five seconds.
    lab::link::spoil(pair.lab().wan()).await;
    let moving = pair.spawn_migration("web", 1, 2, &["--engine", "direct"]);
    assert_eq!(filling(h2).await, 0, "the container is made already");
    lab::link::mend(pair.lab().wan()).await;
    let moved = moving.finish().await;
    assert!(moved.status.success(), "{moved}");
    assert_eq!(h2.sh(digest).await.text(), before.text());
    pair.down().await;
}

/// Waits until a part of the volume's content is there, and returns how many containers there are by then.
async fn filling(host: &lab::Node) -> u64 {
    loop {
        let there =
            "s=$(stat -c %s /var/lib/containers/storage/volumes/big/_data/* 2>/dev/null || true)
             echo ${s:-0} $(podman ps -aq | wc -l)";
        let there = host.sh(there).await;
        let (content, containers) = there.text().split_once(' ').expect("two numbers");
        if content != "0" {
            return containers.parse().expect("a number");
        }
        tokio::time::sleep(lab::LOOK).await;
    }
}

/// Volumes that were filled for a container of which Podman has not heard yet.
#[tokio::test]
async fn an_agent_that_dies_while_it_fills_a_volume_leaves_none() {
    let mut pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2) = (pair.host(1).clone(), pair.host(2).clone());
    h1.run_workload("web", &["-v", "big:/big"], &["echo", "7000"])
        .await;
    h1.sh("head -c 12M /dev/urandom >$(podman volume inspect -f '{{.Mountpoint}}' big)/content")
        .await;
    lab::link::spoil(pair.lab().wan()).await;
    let moving = pair.spawn_migration("web", 1, 2, &["--engine", "direct"]);
    filling(&h2).await;
    pair.replace_agent(2).await;
    lab::link::mend(pair.lab().wan()).await;
    let given_up = moving.finish().await;
    assert!(!given_up.status.success(), "{given_up}");
    assert_eq!(h1.container_state("web").await.as_deref(), Some("running"));
    let left = h2.exec(&["podman", "volume", "ls", "-q"]).await;
    assert_eq!(left.text(), "", "{left}");
    pair.down().await;
}

/// Processes of containers on a host.
const PROCESSES: &str = "find /sys/fs/cgroup -path '*/libpod-*' -not -path '*/libpod-conmon-*' -name cgroup.procs \
                         -exec cat {} + 2>/dev/null | wc -l";

/// An agent that is started anew while it fetches memory: the kernel would give the container zeros in place of it.
/// It is ended, and its original goes on.
#[tokio::test]
async fn a_container_does_not_go_on_without_its_memory() {
    let mut pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2, c1) = (
        pair.host(1).clone(),
        pair.host(2).clone(),
        pair.client(1).clone(),
    );
    h1.run_workload("web", &["-p", "7000:7000"], &["touch", "64", "50", "7000"])
        .await;
    // 64 MiB take five seconds.
    link::narrow(pair.lab().wan(), "100mbit").await;
    let moving = pair.spawn_migration("web", 1, 2, &["--engine", "direct", "--post-copy"]);
    moving.wait_for(r#""finished","phase":"steer""#).await;
    assert_ne!(h2.sh(PROCESSES).await.text(), "0", "it runs there");
    pair.agent(2).signal(rustix::process::Signal::KILL);
    let ends = async {
        while h2.sh(PROCESSES).await.text() != "0" {
            tokio::time::sleep(lab::LOOK).await;
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(3), ends).await;
    assert!(ended.is_ok(), "it goes on without its memory");
    pair.replace_agent(2).await;
    let lost = moving.finish().await;
    assert!(!lost.status.success(), "{lost}");
    link::mend(pair.lab().wan()).await;
    let recovered = h1.exec(&["livemig", "recover"]).await;
    println!("{lost}\n{recovered}");
    assert_eq!(h1.container_state("web").await.as_deref(), Some("running"));
    assert_eq!(h2.container_state("web").await, None);
    let memory = c1.ask(h1.address(), 7000, "memory").await;
    assert_eq!(
        (&memory["wrong"], &memory["stale"]),
        (&0.into(), &0.into()),
        "{memory}"
    );
    pair.down().await;
}

/// Podman fills a new volume from the image when it mounts it, if there is nothing in it.
#[tokio::test]
async fn what_was_removed_from_a_volume_does_not_come_back() {
    let pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2) = (pair.host(1), pair.host(2));
    h1.run_workload("web", &["-v", "emptied:/data"], &["echo", "7000"])
        .await;
    let list = "cd $(podman volume inspect -f '{{.Mountpoint}}' emptied); ls -A";
    let from_image = h1.sh(list).await;
    assert_ne!(from_image.text(), "", "the image has something there");
    h1.sh("cd $(podman volume inspect -f '{{.Mountpoint}}' emptied); find . -mindepth 1 -delete")
        .await;
    let report = pair.migrate("web", 1, 2).await;
    assert_eq!(report["engine"], "direct", "{report}");
    let left = h2.sh(list).await;
    assert_eq!(left.text(), "", "{left}");
    pair.down().await;
}

/// What only a made container has a place for has to come while Podman waits. If it does not, the container
/// stays where it is.
#[tokio::test]
async fn what_takes_longer_than_podman_waits_is_given_up() {
    let pair = Pair::direct(Lab::builder(2)).await;
    let (h1, h2, c1) = (pair.host(1), pair.host(2), pair.client(1));
    h1.run_workload(
        "web",
        &["-p", "7000:7000", "-v", "kept:/kept"],
        &["echo", "7000"],
    )
    .await;
    pair.settled(2, &["-p", "7000:7000"]).await;
    pair.try_migrate("web", 1, 2, &["--rehearse", "restore"])
        .await;
    let client = c1.spawn(&["client-echo", &h1.ip(), "7000"]).await;
    let before = [h1.census().await, h2.census().await];
    let patience = [("LIVEMIG_PODMAN_PATIENCE_MS", "1")];
    let engine = ["--engine", "direct"];
    let moving = pair.spawn_migration_with("web", 1, 2, &engine, &patience);
    let given_up = moving.finish().await;
    assert_eq!(given_up.status.code(), Some(5), "{given_up}");
    assert!(
        given_up.to_string().contains("for which Podman on h2"),
        "{given_up}"
    );
    assert!(given_up.to_string().contains("--engine rest"), "{given_up}");
    for (host, before) in [h1, h2].into_iter().zip(&before) {
        host.assert_as_before(before).await;
    }
    assert_went_on(&client.stop().await, 1);
    pair.down().await;
}
