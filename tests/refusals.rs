//! Everything that is wrong is refused before anything is changed: with an exit code that `livemig
//! --help` documents, one sentence, one hint, and a container that notices nothing.

mod lab;

use lab::pair::Pair;
use lab::{Census, IMAGE, Lab, Node, Output, Workload};
use serde_json::Value;

/// The documented exit codes that a refusal can have.
const REFUSED: i32 = 3;
const UNREACHABLE: i32 = 4;

async fn census(pair: &Pair) -> [Census; 2] {
    [pair.host(1).census().await, pair.host(2).census().await]
}

async fn assert_as_before(pair: &Pair, before: &[Census; 2]) {
    pair.host(1).assert_as_before(&before[0]).await;
    pair.host(2).assert_as_before(&before[1]).await;
}

/// What is expected of a refusal.
struct Expected<'a> {
    exit: i32,
    /// The code of the finding, or of the error if there are no findings.
    code: &'a str,
    /// Parts of the sentence that name what is wrong.
    says: &'a [&'a str],
    /// Part of the hint.
    hint: &'a str,
}

/// Tries to move the container with every command that looks before it leaps, and checks that each
/// refuses alike, clearly, and leaves both hosts as they were.
#[track_caller]
fn assert_refused<'a>(
    pair: &'a Pair,
    container: &'a str,
    to: &'a str,
    expected: Expected<'a>,
) -> impl Future<Output = ()> + 'a {
    let caller = std::panic::Location::caller();
    async move {
        let before = census(pair).await;
        let run = async |words: &[&str]| {
            let command = [&["livemig"], words, &[container, "--to", to]].concat();
            pair.host(1).try_exec(&command).await
        };
        let plain = run(&["migrate"]).await;
        assert_eq!(
            plain.status.code(),
            Some(expected.exit),
            "at {caller}: {plain}"
        );
        assert_clear(caller, &plain, &expected);
        assert_eq!(plain.stdout, "", "at {caller}: {plain}");

        let json = run(&["migrate", "--json"]).await;
        assert_eq!(
            json.status.code(),
            Some(expected.exit),
            "at {caller}: {json}"
        );
        let last = json.stdout.lines().last().unwrap_or_default();
        let error: Value = serde_json::from_str(last)
            .unwrap_or_else(|e| panic!("at {caller}: {e} in the last line of {json}"));
        assert_eq!(error["event"], "error", "at {caller}: {json}");
        assert_eq!(error["exit_code"], expected.exit, "at {caller}: {json}");
        assert_code(caller, &error, expected.code, &json);

        for verb in ["check", "plan"] {
            let looked = run(&[verb]).await;
            assert_eq!(
                looked.status.code(),
                Some(expected.exit),
                "at {caller}: {looked}"
            );
            let said = format!("{}{}", looked.stdout, looked.stderr);
            // A table breaks lines where it has to.
            let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
            for part in expected.says {
                assert!(said.contains(part), "at {caller}: no {part:?} in {looked}");
            }
            let looked = run(&["--json", verb]).await;
            assert_eq!(
                looked.status.code(),
                Some(expected.exit),
                "at {caller}: {looked}"
            );
            assert_code(caller, &looked.json(), expected.code, &looked);
        }
        assert_as_before(pair, &before).await;
    }
}

/// One sentence and one hint, neither of them about livemig's inner life.
fn assert_clear(caller: &std::panic::Location<'_>, output: &Output, expected: &Expected<'_>) {
    let lines: Vec<&str> = output.stderr.lines().collect();
    let [sentence, hint] = lines[..] else {
        panic!("at {caller}: not a sentence and a hint: {output}");
    };
    assert!(sentence.starts_with("livemig: "), "at {caller}: {output}");
    for part in expected.says {
        assert!(
            sentence.contains(part),
            "at {caller}: no {part:?} in {output}"
        );
    }
    let hint = hint.strip_prefix("  → ");
    let hint = hint.unwrap_or_else(|| panic!("at {caller}: no hint in {output}"));
    assert!(
        hint.contains(expected.hint),
        "at {caller}: no {:?} in the hint of {output}",
        expected.hint
    );
}

/// The code stands in a finding that refuses, or is that of the error itself.
fn assert_code(caller: &std::panic::Location<'_>, answer: &Value, code: &str, output: &Output) {
    let found = match answer["findings"].as_array() {
        Some(findings) => findings
            .iter()
            .any(|finding| finding["severity"] == "refuse" && finding["code"] == code),
        None => answer["code"] == code,
    };
    assert!(found, "at {caller}: no code {code} in {output}");
}

/// The busy container of a test, and its client.
async fn busy(pair: &Pair) -> Workload {
    pair.host(1)
        .run_workload("web", &["-p", "7000:7000"], &["echo", "7000"])
        .await;
    let server = pair.host(1).ip();
    pair.client(1)
        .spawn(&["client-echo", &server, "7000"])
        .await
}

async fn assert_undisturbed(client: Workload) {
    let report = client.stop().await;
    assert_eq!(report["wrong"], 0, "{report}");
    assert_eq!(report["resets"], 0, "{report}");
    assert_eq!(report["unanswered"], 0, "{report}");
    assert_eq!(report["same_socket"], true, "{report}");
}

/// A container that only idles: what is wrong is how it was started.
async fn idle(host: &Node, name: &str, podman: &[&str]) {
    host.run_workload(name, podman, &["echo", "7000"]).await;
}

#[tokio::test]
async fn what_is_not_there_or_does_not_run() {
    let pair = Pair::up().await;
    let client = busy(&pair).await;
    let source = pair.host(1);
    let expected = Expected {
        exit: REFUSED,
        code: "no-such-container",
        says: &["`nope`"],
        hint: "livemig ps",
    };
    assert_refused(&pair, "nope", "h2", expected).await;
    let expected = Expected {
        exit: REFUSED,
        code: "bad-name",
        says: &["no/pe"],
        hint: "livemig ps",
    };
    assert_refused(&pair, "no/pe", "h2", expected).await;
    let expected = Expected {
        exit: REFUSED,
        code: "unknown-host",
        says: &["h9"],
        hint: "livemig hosts",
    };
    assert_refused(&pair, "web", "h9", expected).await;

    idle(source, "stopped", &[]).await;
    source.exec(&["podman", "stop", "-t", "5", "stopped"]).await;
    let expected = Expected {
        exit: REFUSED,
        code: "not-running",
        says: &["`stopped` is exited"],
        hint: "podman start stopped",
    };
    assert_refused(&pair, "stopped", "h2", expected).await;
    source.exec(&["podman", "pause", "web"]).await;
    let expected = Expected {
        exit: REFUSED,
        code: "not-running",
        says: &["`web` is paused"],
        hint: "podman unpause web",
    };
    assert_refused(&pair, "web", "h2", expected).await;
    source.exec(&["podman", "unpause", "web"]).await;
    assert_undisturbed(client).await;
    pair.down().await;
}

#[tokio::test]
async fn without_root_or_podman() {
    let pair = Pair::up().await;
    let client = busy(&pair).await;
    let source = pair.host(1);
    let before = census(&pair).await;
    for words in [
        &["migrate", "web", "--to", "h2"][..],
        &["check", "web", "--to", "h2"],
        &["plan", "web", "--to", "h2"],
        &["ps"],
        &["flows"],
        &["hosts"],
        &["recover"],
        &["agent"],
        &["invite"],
    ] {
        let user = ["setpriv", "--reuid=1000", "--clear-groups", "livemig"];
        let output = source.try_exec(&[&user, words].concat()).await;
        assert_eq!(output.status.code(), Some(REFUSED), "{output}");
        let here = std::panic::Location::caller();
        let expected = Expected {
            exit: REFUSED,
            code: "not-root",
            says: &["root"],
            hint: "sudo",
        };
        assert_clear(here, &output, &expected);
    }
    assert_as_before(&pair, &before).await;

    // Not there at all, and there without anybody who listens.
    source.podman_service("stop").await;
    for prepare in [
        "rm -f /run/podman/podman.sock",
        ": >/run/podman/podman.sock",
    ] {
        source.sh(prepare).await;
        let expected = Expected {
            exit: REFUSED,
            code: "no-podman",
            says: &["Podman"],
            hint: "podman.socket",
        };
        assert_refused(&pair, "web", "h2", expected).await;
    }
    source.sh("rm -f /run/podman/podman.sock").await;
    source.podman_service("start").await;
    assert_undisturbed(client).await;
    pair.down().await;
}

#[tokio::test]
async fn a_destination_that_does_not_answer_or_does_not_want_it() {
    let pair = Pair::up().await;
    let client = busy(&pair).await;

    pair.host(2).podman_service("stop").await;
    let expected = Expected {
        exit: UNREACHABLE,
        code: "no-podman",
        says: &["h2", "Podman"],
        hint: "podman.socket",
    };
    assert_refused(&pair, "web", "h2", expected).await;
    pair.host(2).podman_service("start").await;

    // It forgets this host.
    pair.host(2)
        .sh("mv /var/lib/livemig/peers /var/lib/livemig/were-peers && mkdir /var/lib/livemig/peers")
        .await;
    let expected = Expected {
        exit: UNREACHABLE,
        code: "not-admitted",
        says: &["does not know this host"],
        hint: "livemig join",
    };
    assert_refused(&pair, "web", "h2", expected).await;

    pair.agent(2).signal(rustix::process::Signal::TERM);
    pair.host(2)
        .sh("while ss -Hltn | grep -q :27757; do sleep 0.02; done")
        .await;
    let expected = Expected {
        exit: UNREACHABLE,
        code: "unreachable",
        says: &["10.77.0.12"],
        hint: "livemig agent",
    };
    assert_refused(&pair, "web", "h2", expected).await;
    assert_undisturbed(client).await;
    pair.down().await;
}

#[tokio::test]
async fn what_is_taken_at_the_destination() {
    let pair = Pair::up().await;
    let client = busy(&pair).await;
    let destination = pair.host(2);
    let refuse = async |code: &str, says: &[&str], hint: &str| {
        let expected = Expected {
            exit: REFUSED,
            code,
            says,
            hint,
        };
        assert_refused(&pair, "web", "h2", expected).await;
    };
    let gone = async |name: &str| {
        destination
            .exec(&["podman", "rm", "-f", "-t", "0", name])
            .await;
    };

    destination
        .run_workload(
            "other",
            &["-p", "7000:7001", "--ip", "10.88.0.99"],
            &["echo", "7001"],
        )
        .await;
    refuse("port-in-use", &["7000/tcp", "`other`"], "stop `other`").await;
    gone("other").await;

    let mut program = destination.spawn_command(&["workload", "echo", "7000"]);
    destination
        .sh("until ss -Hltn | grep -q :7000; do sleep 0.02; done")
        .await;
    refuse(
        "port-in-use",
        &["a program listens on port 7000/tcp"],
        "ss -lnp",
    )
    .await;
    assert!(program.is_running());
    program.stop().await;

    // As on a host that has never had a container.
    destination
        .exec(&["sysctl", "-w", "net.ipv4.ip_forward=0"])
        .await;
    let next = "sysctl -w net.ipv4.ip_forward=1";
    refuse("not-forwarding", &["net.ipv4.ip_forward is 0"], next).await;
    destination
        .exec(&["sysctl", "-w", "net.ipv4.ip_forward=1"])
        .await;

    let address = pair
        .host(1)
        .exec(&[
            "podman",
            "inspect",
            "-f",
            "{{.NetworkSettings.IPAddress}}",
            "web",
        ])
        .await;
    let address = address.text();
    destination
        .run_workload("other", &["--ip", address], &["echo", "7001"])
        .await;
    refuse("address-in-use", &[address, "`other`"], "stop `other`").await;
    gone("other").await;

    destination
        .run_workload("web", &["--ip", "10.88.0.99"], &["echo", "7001"])
        .await;
    refuse("name-in-use", &["`web`"], "podman rename web").await;
    gone("web").await;

    // A copy of it: what a restore that nobody tidied up after leaves behind.
    pair.host(1)
        .sh("podman container checkpoint -R --tcp-established -e /copy.tar web >/dev/null")
        .await;
    let copy = std::fs::read(pair.host(1).path("/copy.tar")).expect("Podman wrote it");
    std::fs::write(destination.path("/copy.tar"), copy).expect("the host can be written to");
    destination
        .sh("nft 'add table inet silence; add chain inet silence out { type filter hook output priority 0; }; add rule inet silence out drop; add chain inet silence forward { type filter hook forward priority 0; }; add rule inet silence forward drop'
             podman container restore --tcp-established -i /copy.tar >/dev/null
             podman stop -t 0 web >/dev/null; nft delete table inet silence; rm /copy.tar")
        .await;
    pair.host(1).sh("rm /copy.tar").await;
    refuse("id-in-use", &["ID"], "podman rm").await;
    gone("web").await;

    assert_undisturbed(client).await;
    pair.down().await;
}

#[tokio::test]
async fn what_the_destination_lacks_or_has_otherwise() {
    let pair = Pair::up().await;
    let (source, destination) = (pair.host(1), pair.host(2));
    let refuse = async |name: &str, code: &str, says: &[&str], hint: &str| {
        let expected = Expected {
            exit: REFUSED,
            code,
            says,
            hint,
        };
        assert_refused(&pair, name, "h2", expected).await;
    };

    idle(source, "vol", &["-v", "kept:/kept"]).await;
    destination
        .exec(&["podman", "volume", "create", "kept"])
        .await;
    refuse(
        "vol",
        "volume-exists",
        &["volume kept"],
        "podman volume rm kept",
    )
    .await;

    source.sh("mkdir /srv/only-here").await;
    idle(source, "bind", &["-v", "/srv/only-here:/mnt"]).await;
    refuse(
        "bind",
        "bind-source-missing",
        &["/srv/only-here"],
        "put /srv/only-here there",
    )
    .await;

    source
        .sh("printf hush | podman secret create whisper -")
        .await;
    idle(source, "secret", &["--secret", "whisper"]).await;
    refuse(
        "secret",
        "secret-missing",
        &["secret whisper"],
        "podman secret create whisper",
    )
    .await;
    source
        .exec(&["podman", "rm", "-f", "-t", "0", "secret"])
        .await;

    source
        .exec(&[
            "podman",
            "network",
            "create",
            "--subnet",
            "10.91.0.0/24",
            "lan",
        ])
        .await;
    destination
        .exec(&[
            "podman",
            "network",
            "create",
            "--subnet",
            "10.92.0.0/24",
            "lan",
        ])
        .await;
    idle(source, "net", &["--network", "lan"]).await;
    refuse("net", "subnet-mismatch", &["network lan"], "same subnet").await;
    destination.exec(&["podman", "network", "rm", "lan"]).await;

    // The subnet is that of another network there.
    destination
        .exec(&[
            "podman",
            "network",
            "create",
            "--subnet",
            "10.91.0.0/25",
            "other",
        ])
        .await;
    idle(destination, "on-other", &["--network", "other"]).await;
    refuse("net", "subnet-taken", &["network lan"], "another subnet").await;
    destination
        .exec(&["podman", "rm", "-f", "-t", "0", "on-other"])
        .await;

    // The same name for other contents.
    destination
        .sh(&format!("podman tag {IMAGE} localhost/spare && podman untag {IMAGE} && podman import -q /etc/hostname {IMAGE} 2>/dev/null || printf 'FROM scratch\nCOPY hostname /\n' | podman build -q -t {IMAGE} -f - /etc"))
        .await;
    idle(source, "image", &[]).await;
    refuse("image", "image-name-taken", &[IMAGE], "podman untag").await;
    pair.down().await;
}

#[tokio::test]
async fn containers_that_cannot_be_taken_apart_from_their_host() {
    let pair = Pair::up().await;
    let source = pair.host(1);
    let refuse = async |name: &str, code: &str, says: &[&str], hint: &str| {
        let expected = Expected {
            exit: REFUSED,
            code,
            says,
            hint,
        };
        assert_refused(&pair, name, "h2", expected).await;
        assert_eq!(
            source.container_state(name).await.as_deref(),
            Some("running")
        );
    };

    // Pods need an image of Podman's own for their infra container unless told to do without.
    source
        .exec(&["podman", "pod", "create", "--infra=false", "--name", "pea"])
        .await;
    idle(source, "in-pod", &["--pod", "pea"]).await;
    refuse("in-pod", "in-pod", &["pod"], "outside of a pod").await;

    idle(source, "first", &[]).await;
    source
        .run_workload(
            "shares",
            &["--network", "container:first"],
            &["echo", "7001"],
        )
        .await;
    refuse(
        "shares",
        "network-mode",
        &["network of container"],
        "bridge network",
    )
    .await;
    idle(source, "on-host", &["--network", "host"]).await;
    refuse(
        "on-host",
        "network-mode",
        &["network of the host"],
        "bridge network",
    )
    .await;
    source
        .exec(&["podman", "rm", "-f", "-t", "0", "on-host"])
        .await;
    idle(source, "pids", &["--pid", "host"]).await;
    refuse(
        "pids",
        "shared-namespace",
        &["process namespace"],
        "namespaces of its own",
    )
    .await;
    idle(source, "ipc", &["--ipc", "host"]).await;
    refuse(
        "ipc",
        "shared-namespace",
        &["IPC namespace"],
        "namespaces of its own",
    )
    .await;
    idle(source, "users", &["--uidmap", "0:100000:65536"]).await;
    refuse(
        "users",
        "user-namespace",
        &["user namespace"],
        "without --userns",
    )
    .await;

    source
        .sh("mkdir /srv/lower && echo below >/srv/lower/file")
        .await;
    idle(source, "layered", &["-v", "/srv/lower:/mnt:O"]).await;
    refuse("layered", "overlay-mount", &["/mnt"], "without :O").await;
    let mount = format!("type=image,source={IMAGE},destination=/mnt");
    idle(source, "imaged", &["--mount", &mount]).await;
    refuse(
        "imaged",
        "image-mount",
        &["mounted on /mnt"],
        "container's own image",
    )
    .await;
    source
        .run_workload(
            "ring",
            &["--security-opt", "seccomp=unconfined"],
            &["uring", "7000"],
        )
        .await;
    refuse("ring", "io-uring-in-use", &["io_uring"], "io_uring").await;
    // As Debian has it: /usr/libexec/podman/catatonit is a link.
    idle(source, "begun", &["--init"]).await;
    let hint = "--init-path /usr/bin/catatonit";
    refuse("begun", "bind-source-link", &["/run/podman-init"], hint).await;
    idle(source, "guest", &["--read-only", "--user", "0:0"]).await;
    refuse(
        "guest",
        "users-made-by-podman",
        &["/etc/group"],
        "/etc/passwd",
    )
    .await;
    source.run_workload("paths", &[], &["mptcp", "7000"]).await;
    refuse("paths", "socket-not-dumpable", &["MPTCP"], "plain TCP").await;
    pair.down().await;
}

/// CRIU reads the limits of every process, which root without that capability may not.
#[tokio::test]
async fn processes_of_others_where_root_is_not_all_of_root() {
    let pair = Pair::up().await;
    idle(pair.host(1), "theirs", &["--user", "1234"]).await;
    let without = ["setpriv", "--bounding-set", "-sys_resource"];
    for verb in ["check", "migrate"] {
        let command = ["livemig", "--json", verb, "theirs", "--to", "h2"];
        let refused = pair
            .host(1)
            .try_exec(&[&without[..], &command].concat())
            .await;
        assert_eq!(refused.status.code(), Some(REFUSED), "{refused}");
        for part in ["limits-not-readable", "user 1234", "CAP_SYS_RESOURCE"] {
            assert!(refused.stdout.contains(part), "no {part} in {refused}");
        }
    }
    // Root's own are no obstacle.
    idle(pair.host(1), "own", &[]).await;
    let command = ["livemig", "check", "own", "--to", "h2"];
    pair.host(1).exec(&[&without[..], &command].concat()).await;
    pair.down().await;
}

#[tokio::test]
async fn what_could_do_more_at_the_destination_than_others() {
    let pair = Pair::up().await;
    for (name, options, code, says, hint) in [
        (
            "mighty",
            &["--privileged"][..],
            "privileged-not-allowed",
            "privileged",
            "livemig agent --allow privileged",
        ),
        (
            "able",
            &["--cap-add", "NET_ADMIN"],
            "capabilities-not-allowed",
            "CAP_NET_ADMIN",
            "livemig agent --allow capabilities",
        ),
        (
            "equipped",
            &["--device", "/dev/null"],
            "devices-not-allowed",
            "/dev/null",
            "livemig agent --allow devices",
        ),
        (
            "named",
            &["--uts", "host"],
            "namespace-not-allowed",
            "host name namespace",
            "livemig agent --allow host-namespaces",
        ),
        (
            "curious",
            &["-v", "/etc:/mnt:ro"],
            "bind-not-allowed",
            "/etc, mounted on /mnt",
            "livemig agent --allow-bind /etc",
        ),
        (
            // There is something of that name on both hosts, and it is below what is allowed.
            "devious",
            &["-v", "/srv/way-out:/mnt"],
            "bind-not-allowed",
            "/srv/way-out",
            "livemig agent --allow-bind",
        ),
    ] {
        for host in [pair.host(1), pair.host(2)] {
            host.sh("ln -sfn /etc /srv/way-out").await;
        }
        idle(pair.host(1), name, options).await;
        let expected = Expected {
            exit: REFUSED,
            code,
            says: &[says],
            hint,
        };
        assert_refused(&pair, name, "h2", expected).await;
        pair.host(1)
            .exec(&["podman", "rm", "-f", "-t", "0", name])
            .await;
    }
    pair.down().await;
}

#[tokio::test]
async fn another_runtime_at_the_destination() {
    let pair = Pair::of(Lab::builder(2).host_runtime(2, "crun")).await;
    let client = busy(&pair).await;
    let expected = Expected {
        exit: REFUSED,
        code: "runtime-mismatch",
        says: &["runc", "crun"],
        hint: "containers.conf",
    };
    assert_refused(&pair, "web", "h2", expected).await;
    assert_undisturbed(client).await;
    pair.down().await;
}

#[tokio::test]
async fn arguments_that_make_no_sense() {
    let lab = Lab::new(1).await;
    let host = lab.host(1);
    for (words, says) in [
        (&["migrate"][..], "CONTAINER"),
        (&["migrate", "web"], "--to"),
        (
            &["migrate", "web", "--to", "h2", "--rehearse", "nap"],
            "phases are",
        ),
        (&["invite", "--valid", "3w"], "unit of time"),
        (&["move", "web"], "move"),
        (&[], "Usage"),
    ] {
        let output = host.try_exec(&[&["livemig"], words].concat()).await;
        assert_eq!(output.status.code(), Some(2), "{output}");
        assert!(output.stderr.contains(says), "no {says:?} in {output}");
    }
    lab.down().await;
}
