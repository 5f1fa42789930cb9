//! The lab itself: what every other lab test takes for granted.

mod lab;

use std::collections::BTreeSet;
use std::process::Command;

use lab::{IMAGE, Lab};

/// A container's server goes on answering over the connection it had, through Podman's own
/// checkpoint and restore. Nothing of livemig is in this: when it fails, the hosts are to blame.
async fn podman_keeps_a_connection(runtime: &str) {
    let lab = Lab::builder(2).runtime(runtime).up().await;
    let (h1, c1) = (lab.host(1), lab.client(1));
    h1.run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let used = h1
        .exec(&["podman", "inspect", "-f", "{{.OCIRuntime}}", "web"])
        .await;
    assert_eq!(used.text(), runtime);
    let client = c1.spawn(&["client-echo", &h1.ip(), "7000"]).await;

    // Incoming packets are dropped meanwhile: the host would answer them with a reset.
    h1.sh(
        "nft 'add table inet hold; add chain inet hold in { type filter hook prerouting priority raw; };
              add rule inet hold in iifname eth0 drop'
         podman container checkpoint --tcp-established --export /tmp/web.tar web >/dev/null
         podman rm -f web >/dev/null
         podman container restore --tcp-established --import /tmp/web.tar >/dev/null
         nft delete table inet hold",
    )
    .await;

    assert_eq!(h1.container_state("web").await.as_deref(), Some("running"));
    let answered = c1.ask(h1.address(), 7000, "info").await;
    assert_eq!(answered["open"], 2, "the old connection and the question");
    let report = client.stop().await;
    assert_eq!(report["wrong"], 0, "{report}");
    assert_eq!(report["resets"], 0, "{report}");
    assert_eq!(report["unanswered"], 0, "{report}");
    assert_eq!(report["same_socket"], true, "{report}");
    assert!(report["replies"].as_u64() > Some(10), "{report}");
    lab.down().await;
}

#[tokio::test]
async fn runc_keeps_a_connection() {
    podman_keeps_a_connection("runc").await;
}

#[tokio::test]
async fn crun_keeps_a_connection() {
    podman_keeps_a_connection("crun").await;
}

#[tokio::test]
async fn hosts_see_each_other_and_have_the_same_image() {
    let lab = Lab::builder(3).clients(2).cold(3).up().await;
    for (from, to) in [(1, 2), (2, 3), (3, 1)] {
        let (from, to) = (lab.host(from), lab.host(to));
        from.exec(&["ping", "-c1", "-W2", &to.ip()]).await;
        from.exec(&["ping", "-c1", "-W2", &to.address6().to_string()])
            .await;
        from.exec(&["ping", "-c1", "-W2", to.name()]).await;
    }
    let settings = lab
        .host(1)
        .sh("cd /proc/sys/net; cat ipv4/conf/eth0/rp_filter ipv4/ip_forward ipv6/conf/all/forwarding")
        .await;
    assert_eq!(settings.stdout, "1\n1\n1\n");
    // What goes between the hosts can be filtered where it passes.
    let silent = "nft 'add table bridge t; add chain bridge t f { type filter hook forward priority 0; }; add rule bridge t f iifname h1 drop'";
    lab.wan().sh(silent).await;
    let ping = ["ping", "-c1", "-W1", "h2"];
    assert!(!lab.host(1).try_exec(&ping).await.status.success());
    lab.wan().sh("nft delete table bridge t").await;
    lab.host(1).exec(&ping).await;
    let id = async |host: usize| {
        let format = ["podman", "image", "ls", "--no-trunc", "-q", IMAGE];
        lab.host(host).exec(&format).await.text().to_owned()
    };
    assert!(id(1).await.starts_with("sha256:"));
    assert_eq!(id(1).await, id(2).await);
    assert_eq!(id(3).await, "", "cold");

    // Podman answers over its socket from here, too.
    tokio::net::UnixStream::connect(lab.host(1).podman_socket())
        .await
        .expect("the socket is there");
    // Each host has locks of its own.
    let locks = async |host: usize| {
        let host = lab.host(host);
        host.sh("stat -c %d:%i /dev/shm/libpod_lock").await.stdout
    };
    assert_ne!(locks(1).await, locks(2).await);
    let both = async |client: usize| {
        let output = lab.client(client).exec(&["ip", "-br", "address"]).await;
        output.stdout
    };
    assert!(both(1).await.contains("10.77.0.101"));
    assert!(both(2).await.contains("fd77::102"));
}

#[tokio::test]
async fn published_ports_answer_over_tcp_and_udp_and_ipv6() {
    let lab = Lab::new(1).await;
    let (h1, c1) = (lab.host(1), lab.client(1));
    h1.exec(&["podman", "network", "create", "--ipv6", "dual"])
        .await;
    let publish = [
        "--network",
        "dual",
        "-p",
        "7000:7000",
        "-p",
        "7001:7001/udp",
    ];
    h1.run_workload("tcp", &publish[..4], &["echo", "7000", "--host", "v6"])
        .await;
    h1.run_workload(
        "udp",
        &[&publish[..2], &publish[4..]].concat(),
        &["udp-count", "7001", "--host", "v6"],
    )
    .await;
    for address in [h1.ip(), h1.address6().to_string()] {
        let tcp = c1
            .run(&[
                "client-echo",
                &address,
                "7000",
                "--connections",
                "20",
                "--seconds",
                "1",
            ])
            .await;
        assert_eq!(tcp["connected"], 20, "{tcp}");
        assert_eq!(tcp["wrong"], 0, "{tcp}");
        assert_eq!(tcp["requests"], tcp["replies"], "{tcp}");
        let udp = c1
            .run(&[
                "client-udp",
                &address,
                "7001",
                "--mode",
                "oneway",
                "--seconds",
                "1",
            ])
            .await;
        assert_eq!(udp["answered"], true, "{udp}");
        assert_eq!(udp["lost"], 0, "{udp}");
        assert_eq!(udp["duplicated"], 0, "{udp}");
        assert!(udp["sent"].as_u64() > Some(500), "{udp}");
    }
}

#[tokio::test]
async fn a_census_sees_what_changed_and_nothing_else() {
    let lab = Lab::new(1).await;
    let h1 = lab.host(1);
    // Podman would draw another address at the next start.
    let podman = ["-p", "7000:7000", "--ip", "10.88.0.9"];
    h1.run_workload("web", &podman, &["echo", "7000"]).await;
    let before = h1.census().await;
    // Gone and back: other MAC addresses, interface numbers and namespace names.
    h1.exec(&["podman", "stop", "-t", "5", "web"]).await;
    let stopped = before
        .difference(&h1.census().await)
        .expect("a container that stopped is noticed");
    assert!(stopped.contains("exited"), "{stopped}");
    h1.exec(&["podman", "start", "web"]).await;
    h1.assert_as_before(&before).await;
    // What a migration that is rolled back may do.
    h1.sh("podman container checkpoint web; podman container restore web")
        .await;
    h1.assert_as_before(&before).await;

    let changes = [
        (
            "nft",
            "nft add table inet livemig",
            "nft delete table inet livemig",
        ),
        (
            "rules",
            "ip rule add fwmark 0x3000000/0xff000000 lookup 7105795 priority 100",
            "ip rule del priority 100",
        ),
        (
            "routes",
            "ip route add default dev eth0 table 7105795",
            "ip route flush table 7105795",
        ),
        (
            "links",
            "ip tuntap add livemig3 mode tun",
            "ip link del livemig3",
        ),
        (
            "sysctls",
            "echo 2 >/proc/sys/net/ipv4/conf/eth0/rp_filter",
            "echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter",
        ),
        ("files", "mkdir -p /run/livemig/left", "rm -r /run/livemig"),
        ("files", "touch /var/tmp/left", "rm /var/tmp/left"),
        (
            "volumes",
            "podman volume create left",
            "podman volume rm left",
        ),
        (
            "marks",
            "conntrack -I -s 10.77.0.9 -d 10.77.0.8 -p udp --sport 5 --dport 6 -t 60 -m 0x1000000",
            "conntrack -D -m 0x1000000/0xff000000",
        ),
        (
            "listening",
            "workload echo 7999 >/dev/null 2>&1 & until ss -Hltn | grep -q :7999; do :; done",
            "kill $(ps -eo pid=,args= | sed -n 's/^ *\\([0-9]*\\) workload echo 7999/\\1/p')",
        ),
    ];
    for (_, make, _) in changes {
        // Not in the session of a shell that ends: what is made stays.
        h1.exec(&["setsid", "--wait", "sh", "-ec", make]).await;
    }
    let difference = before
        .difference(&h1.census().await)
        .expect("all this is noticed");
    for (section, make, _) in changes {
        let heading = format!("{section}:\n");
        assert!(difference.contains(&heading), "{make}: {difference}");
    }
    for (_, _, undo) in changes {
        h1.sh(undo).await;
    }
    h1.assert_as_before(&before).await;
}

/// Namespaces, mounts, cgroups and processes of the machine that belong to a lab.
fn traces(id: &str) -> BTreeSet<String> {
    let sh = format!(
        "ip netns 2>/dev/null | sed 's/^/netns /' | grep -F '{id}'
         grep -F '/livemig-lab/{id}' /proc/[0-9]*/mountinfo 2>/dev/null | sed 's/^/mount /'
         find $(findmnt -nro TARGET -t cgroup2,cgroup) -path '*/livemig-lab/{id}*' 2>/dev/null | sed 's/^/cgroup /'
         # The dead whom init has not buried yet are in a cgroup that is deleted.
         grep -F '/livemig-lab/{id}' /proc/[0-9]*/cgroup 2>/dev/null | grep -v '(deleted)' | sed 's/^/process /'
         find /run/livemig-lab -path '*{id}*' 2>/dev/null | sed 's/^/file /'
         ip -br link | grep -E '^(h|c)[0-9]' | sed 's/^/link /'"
    );
    let output = Command::new("sh")
        .args(["-c", &sh])
        .output()
        .expect("sh can be run");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Everything of the machine's own network namespace and mounts.
fn machine() -> String {
    let output = Command::new("sh")
        .args([
            "-c",
            "ip -o link; ip route show table all; ip rule; nft list ruleset; cut -d' ' -f5- /proc/self/mountinfo; ls /run/netns",
        ])
        .output()
        .expect("sh can be run");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn down_leaves_nothing() {
    let before = machine();
    let lab = Lab::new(2).await;
    let id = lab.id().to_owned();
    assert!(!traces(&id).is_empty(), "what is looked for can be found");
    assert_eq!(machine(), before, "a lab has no part outside itself");
    lab.host(1)
        .run_workload("web", &["-p", "7000:7000"], &["touch", "64", "50", "7000"])
        .await;
    lab.host(1).exec(&["podman", "pause", "web"]).await;
    let _still_running = lab.client(1).spawn_command(&["sleep", "1000"]);
    let _agent = lab.host(2).spawn_command(&["sleep", "1000"]);
    lab.down().await;
    assert_eq!(traces(&id), BTreeSet::new());
    assert_eq!(machine(), before);
}

#[tokio::test]
async fn a_lab_that_fails_to_start_leaves_nothing() {
    let id = format!("broken-{}", std::process::id());
    // No link can have this MTU.
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/lab"))
        .args(["--id", &id, "up", "2", "--mtu", "99999999"])
        .output()
        .expect("the script can be run");
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("did not come up"), "{said}");
    assert_eq!(traces(&id), BTreeSet::new());
}

#[tokio::test]
async fn a_panic_and_a_kill_take_the_lab_down() {
    let lab = Lab::new(1).await;
    let id = lab.id().to_owned();
    let panicked = tokio::spawn(async move {
        let _lab = lab;
        panic!("on purpose");
    })
    .await;
    assert!(panicked.is_err());
    assert_eq!(traces(&id), BTreeSet::new());

    // A process that is killed drops nothing: its leash has to notice.
    let mut victim = Command::new("sleep")
        .arg("1000")
        .spawn()
        .expect("sleep can be run");
    let id = format!("leash-{}", std::process::id());
    let up = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/lab"))
        .args(["--id", &id, "up", "1", "--leash", &victim.id().to_string()])
        .status()
        .expect("the script can be run");
    assert!(up.success());
    assert!(!traces(&id).is_empty());
    victim.kill().expect("it runs");
    victim.wait().expect("it was killed");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !traces(&id).is_empty() {
        assert!(
            std::time::Instant::now() < deadline,
            "still there: {:?}",
            traces(&id)
        );
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}
