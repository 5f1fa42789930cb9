//! What fails is undone: the container goes on where it was, its connections do too, and neither
//! host shows that anything was tried. With either engine: each test here is run with both.

mod lab;

use lab::gate::{break_criu, close, mend_criu, open, reached, signal_podman};
use lab::pair::{Pair, events, report};
use lab::{Census, Lab, Node, Output, Process, Workload, gate, link};
use rustix::process::Signal;

const PUBLISH: [&str; 2] = ["-p", "7000:7000"];

/// How the container's processes are to cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Rest,
    Direct,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Engine::Rest => "rest",
            Engine::Direct => "direct",
        }
    }
}

/// A test for each engine, of the same name.
macro_rules! with_both_engines {
    ($($test:ident),+ $(,)?) => {
        mod rest {
            $(#[tokio::test] async fn $test() { super::$test(super::Engine::Rest).await; })+
        }
        mod direct {
            $(#[tokio::test] async fn $test() { super::$test(super::Engine::Direct).await; })+
        }
    };
}

with_both_engines!(
    each_phase_can_fail_at_its_end,
    criu_fails_on_either_host,
    the_destinations_disk_is_full,
    a_signal_undoes_everything,
    the_agent_is_killed,
    a_crash_is_recovered_from,
    a_crash_after_it_came_home_leaves_nothing,
    the_operator_keeps_it_at_the_source,
    the_operator_leaves_it_to_the_destination,
);

/// A container with a busy connection, and what both hosts are like before anything is tried.
struct Scene {
    engine: Engine,
    pair: Pair,
    client: Workload,
    before: [Census; 2],
}

impl Scene {
    async fn set(engine: Engine, lab: lab::Builder) -> Scene {
        let pair = match engine {
            Engine::Rest => Pair::of(lab).await,
            Engine::Direct => Pair::direct(lab).await,
        };
        for host in [1, 2] {
            // These stay, whatever is tried.
            let host = pair.host(host);
            host.sh("mkdir -p /run/livemig/hops /run/livemig/staging \
                     /var/lib/livemig/journal/outgoing /var/lib/livemig/journal/incoming;
                 touch /run/livemig/hops/interfaces.lock /run/livemig/hops/records.lock")
                .await;
            gate::install(host).await;
        }
        let has_image = "podman image exists localhost/workload:latest";
        if pair
            .host(2)
            .try_exec(&["sh", "-c", has_image])
            .await
            .status
            .success()
        {
            pair.settled(2, &PUBLISH).await;
        }
        let h1 = pair.host(1);
        h1.run_workload("web", &PUBLISH, &["echo", "7000"]).await;
        let client = pair
            .client(1)
            .spawn(&["client-echo", &h1.ip(), "7000"])
            .await;
        let before = [h1.census().await, pair.host(2).census().await];
        Scene {
            engine,
            pair,
            client,
            before,
        }
    }

    fn start(&self) -> Process {
        self.start_with(&[])
    }

    fn start_with(&self, variables: &[(&str, &str)]) -> Process {
        let more = ["--engine", self.engine.name()];
        self.pair
            .spawn_migration_with("web", 1, 2, &more, variables)
    }

    async fn rehearse(&self, phase: &str) -> Output {
        let more = ["--engine", self.engine.name(), "--rehearse", phase];
        self.pair.try_migrate("web", 1, 2, &more).await
    }

    /// Begins a migration that stands still when packets are about to wait, and all that goes ahead of the
    /// container has gone.
    async fn start_up_to_hold(&self) -> Process {
        let attempt = self.start_with(&[("LIVEMIG_STAND_STILL", "started:hold")]);
        attempt.stands_still().await;
        attempt
    }

    /// Where this host's CRIU is about to begin, with its end of this phase. With the direct engine the
    /// runtime was called long before and CRIU waits in it.
    fn gate(&self, phase: Phase) -> (&Node, &'static str) {
        let host = match phase {
            Phase::Freeze => self.pair.host(1),
            Phase::Restore => self.pair.host(2),
        };
        let gate = match (self.engine, phase) {
            (Engine::Direct, _) => "criu",
            (Engine::Rest, Phase::Freeze) => "checkpoint",
            (Engine::Rest, Phase::Restore) => "restore",
        };
        (host, gate)
    }

    /// Begins a migration that waits where CRIU is to dump or to restore the container.
    async fn start_up_to(&self, phase: Phase) -> Process {
        let (host, gate) = self.gate(phase);
        // CRIU is asked before, too, what it can do.
        let attempt = self.start_up_to_hold().await;
        close(host, gate).await;
        attempt.go_on();
        reached(host, gate).await;
        attempt
    }

    /// Lets go on what waits there, whoever still does.
    async fn go_on(&self, phase: Phase) {
        let (host, gate) = self.gate(phase);
        open(host, gate).await;
    }

    /// Panics unless both hosts are as they were and the container serves from the first.
    async fn assert_untouched(&self, why: &str) {
        println!("{why}: is all as it was?");
        for (number, before) in [1, 2].into_iter().zip(&self.before) {
            self.pair.host(number).assert_as_before(before).await;
        }
        let h1 = self.pair.host(1);
        let answer = self.pair.client(1).ask(h1.address(), 7000, "info").await;
        assert!(answer["open"].as_u64() >= Some(2), "{why}: {answer}");
    }

    /// The next attempt succeeds, and the connection has lived through everything.
    async fn finish(self) {
        let output = self.start().finish().await;
        assert!(output.status.success(), "{output}");
        let moved = report(&output);
        assert_eq!(moved["engine"], self.engine.name(), "{moved}");
        self.pair.assert_moved("web", 1, 2, &moved).await;
        self.end(2).await;
    }

    /// The connection goes on at this host, and no journal is left.
    async fn end(self, at: usize) {
        let h1 = self.pair.host(1);
        let info = self
            .pair
            .client(1)
            .ask(self.pair.host(at).address(), 7000, "info")
            .await;
        assert!(info["open"].as_u64() >= Some(2), "{info}");
        for host in [h1, self.pair.host(2)] {
            let left = host
                .sh("find /var/lib/livemig/journal -type f; find /run/livemig -maxdepth 1 -name '*.lock'")
                .await;
            assert_eq!(left.text(), "", "{} has a journal or a lock", host.name());
        }
        let report = self.client.stop().await;
        assert_eq!(report["wrong"], 0, "{report}");
        assert_eq!(report["resets"], 0, "{report}");
        assert_eq!(report["unanswered"], 0, "{report}");
        assert_eq!(report["same_socket"], true, "{report}");
        self.pair.down().await;
    }
}

/// The phases in which CRIU is at work, one at each host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Freeze,
    Restore,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Phase::Freeze => "freeze",
            Phase::Restore => "restore",
        }
    }
}

/// The phase that a migration was in when it ended.
fn last_started(tried: &Output) -> String {
    let events = events(tried);
    let mut started = events.iter().filter(|event| event["event"] == "started");
    let last = started
        .next_back()
        .expect("a migration begins with a phase");
    last["phase"].as_str().expect("it has a name").to_owned()
}

#[track_caller]
fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "{output}");
}

async fn each_phase_can_fail_at_its_end(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2)).await;
    let phases = [
        "preflight",
        "prepare",
        "precopy",
        "hold",
        "freeze",
        "transfer",
        "restore",
    ];
    for phase in phases {
        let tried = scene.rehearse(phase).await;
        assert_code(&tried, 0);
        let finished = format!(r#"{{"event":"finished","phase":"{phase}""#);
        assert!(tried.stdout.contains(&finished), "{tried}");
        assert!(tried.stdout.contains("rolling-back"), "{tried}");
        scene.assert_untouched(phase).await;
    }
    for phase in ["steer", "commit"] {
        let tried = scene.rehearse(phase).await;
        assert_code(&tried, 2);
        assert!(tried.to_string().contains("no way back"), "{tried}");
        scene.assert_untouched(phase).await;
    }
    scene.finish().await;
}

async fn criu_fails_on_either_host(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2)).await;
    for phase in [Phase::Freeze, Phase::Restore] {
        let (broken, _) = scene.gate(phase);
        let attempt = scene.start_up_to_hold().await;
        break_criu(broken).await;
        attempt.go_on();
        let tried = attempt.finish().await;
        mend_criu(broken).await;
        assert_code(&tried, 5);
        assert_eq!(last_started(&tried), phase.name(), "{tried}");
        scene.assert_untouched("CRIU fails").await;

        // It is missed as soon as it is needed, which with the direct engine is before anything waits.
        break_criu(broken).await;
        let tried = scene.start().finish().await;
        mend_criu(broken).await;
        assert_code(&tried, 5);
        println!(
            "{engine:?}: without CRIU it ends in {}",
            last_started(&tried)
        );
        scene
            .assert_untouched("CRIU fails from the beginning")
            .await;
    }
    scene.finish().await;
}

async fn the_destinations_disk_is_full(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2).cold(2)).await;
    let h2 = scene.pair.host(2);
    h2.sh("cd /var/lib/containers; free=$(df --output=avail -k . | tail -n1); fallocate -l $((free - 512))K full")
        .await;
    let tried = scene.start().finish().await;
    h2.sh("rm /var/lib/containers/full").await;
    assert_code(&tried, 5);
    scene.assert_untouched("disk full").await;
    scene.finish().await;
}

async fn a_signal_undoes_everything(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2)).await;
    let h2 = scene.pair.host(2);

    let attempt = scene.start();
    attempt.wait_for(r#""finished","phase":"preflight""#).await;
    signal_podman(h2, "STOP").await;
    attempt.signal(Signal::INT);
    signal_podman(h2, "CONT").await;
    assert_code(&attempt.finish().await, 130);
    scene.assert_untouched("SIGINT in prepare").await;

    let attempt = scene.start_up_to(Phase::Freeze).await;
    // Meanwhile nobody else may move it, and asking does no harm.
    let second = scene.start().finish().await;
    assert_code(&second, 3);
    assert!(
        second.to_string().contains("being migrated already"),
        "{second}"
    );
    attempt.signal(Signal::INT);
    scene.go_on(Phase::Freeze).await;
    assert_code(&attempt.finish().await, 130);
    scene.assert_untouched("SIGINT in freeze").await;

    let attempt = scene.start_up_to(Phase::Restore).await;
    attempt.signal(Signal::TERM);
    attempt.wait_for("rolling-back").await;
    // The copy comes to life when nobody wants it any more.
    scene.go_on(Phase::Restore).await;
    assert_code(&attempt.finish().await, 130);
    scene.assert_untouched("SIGTERM in restore").await;
    scene.finish().await;
}

async fn the_agent_is_killed(engine: Engine) {
    let mut scene = Scene::set(engine, Lab::builder(2)).await;
    let h2 = scene.pair.host(2).clone();

    let attempt = scene.start();
    attempt.wait_for(r#""finished","phase":"preflight""#).await;
    signal_podman(&h2, "STOP").await;
    // The new agent asks Podman what it finds.
    tokio::join!(scene.pair.replace_agent(2), signal_podman(&h2, "CONT"));
    assert_code(&attempt.finish().await, 5);
    scene.assert_untouched("no agent in prepare").await;

    let attempt = scene.start();
    attempt.wait_for(r#""started","phase":"restore""#).await;
    scene.pair.replace_agent(2).await;
    assert_code(&attempt.finish().await, 5);
    scene.assert_untouched("no agent in transfer").await;

    // All that is needed is there, and CRIU brings the container to life with no agent there.
    let attempt = scene.start_up_to(Phase::Restore).await;
    let (_, gate) = scene.gate(Phase::Restore);
    tokio::join!(scene.pair.replace_agent(2), open(&h2, gate));
    assert_code(&attempt.finish().await, 5);
    scene.assert_untouched("no agent in restore").await;
    scene.finish().await;
}

/// Runs `livemig recover` and returns whether it finished what was begun.
async fn recover(pair: &Pair) -> bool {
    let recovered = pair.host(1).exec(&["livemig", "--json", "recover"]).await;
    let found = recovered.json();
    assert_eq!(found.as_array().map(Vec::len), Some(1), "{recovered}");
    assert_eq!(found[0]["leftovers"], serde_json::json!([]), "{recovered}");
    found[0]["finished"].as_bool().expect("yes or no")
}

async fn a_crash_is_recovered_from(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2)).await;
    let [h1, h2] = [scene.pair.host(1), scene.pair.host(2)];

    let attempt = scene.start();
    attempt.wait_for(r#""finished","phase":"preflight""#).await;
    signal_podman(h2, "STOP").await;
    attempt.wait_for(r#""started","phase":"prepare""#).await;
    attempt.kill().await;
    signal_podman(h2, "CONT").await;
    assert!(!recover(&scene.pair).await);
    scene.assert_untouched("crash in prepare").await;

    let attempt = scene.start_up_to(Phase::Freeze).await;
    // What is under way is not touched.
    let nothing = h1.exec(&["livemig", "--json", "recover"]).await;
    assert_eq!(nothing.json(), serde_json::json!([]));
    attempt.kill().await;
    // The dump begins while it is being recovered from; CRIU leaves frozen what it finds frozen.
    tokio::join!(
        async { assert!(!recover(&scene.pair).await) },
        scene.go_on(Phase::Freeze)
    );
    scene.assert_untouched("crash in freeze").await;

    let attempt = scene.start_up_to(Phase::Restore).await;
    break_criu(h2).await;
    attempt.kill().await;
    scene.go_on(Phase::Restore).await;
    assert!(!recover(&scene.pair).await);
    mend_criu(h2).await;
    scene
        .assert_untouched("crash in a restore that fails")
        .await;

    let attempt = scene.start_up_to(Phase::Restore).await;
    attempt.kill().await;
    scene.go_on(Phase::Restore).await;
    // It may have spoken to its peers by then: now it stays there.
    assert!(recover(&scene.pair).await);
    assert_eq!(h1.container_state("web").await, None);
    assert_eq!(h2.container_state("web").await.as_deref(), Some("running"));
    scene.end(2).await;
}

/// The connections that have ended at home are forgotten where they came by, and with them the tunnel.
async fn a_crash_after_it_came_home_leaves_nothing(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2)).await;
    let more = ["--engine", engine.name()];
    let away = scene.pair.try_migrate("web", 1, 2, &more).await;
    assert!(away.status.success(), "{away}");
    let h2 = scene.pair.host(2);
    close(h2, "delete").await;
    let home = scene.pair.spawn_migration("web", 2, 1, &more);
    reached(h2, "delete").await;
    home.kill().await;
    open(h2, "delete").await;
    let recovered = h2.exec(&["livemig", "--json", "recover"]).await;
    let found = recovered.json();
    assert_eq!(found[0]["finished"], true, "{recovered}");
    assert_eq!(found[0]["leftovers"], serde_json::json!([]), "{recovered}");
    scene.assert_untouched("crash after it came home").await;
    scene.end(1).await;
}

/// A migration whose copy is about to be restored, and whose source has died.
async fn in_doubt(scene: &Scene) {
    let attempt = scene.start_up_to(Phase::Restore).await;
    attempt.kill().await;
}

async fn the_operator_keeps_it_at_the_source(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2)).await;
    let [h1, h2] = [scene.pair.host(1), scene.pair.host(2)];
    let wan = scene.pair.lab().wan();

    in_doubt(&scene).await;
    link::cut(wan).await;
    // It comes to life, and nobody here knows.
    scene.go_on(Phase::Restore).await;
    let kept = h1
        .try_exec(&["livemig", "--json", "recover", "--keep", "source"])
        .await;
    assert_code(&kept, 6);
    let found = kept.json();
    let left = found[0]["leftovers"].as_array().expect("a list");
    let left: Vec<_> = left.iter().map(|left| &left["effect"]).collect();
    assert_eq!(
        left,
        ["what h2 has restored", "what h2 has prepared"],
        "{kept}"
    );
    let answer = scene.pair.client(1).ask(h1.address(), 7000, "info").await;
    assert!(answer["open"].as_u64() >= Some(2), "{answer}");
    // Two of them, and this one is heard.
    assert_eq!(h2.container_state("web").await.as_deref(), Some("running"));

    link::mend(wan).await;
    assert!(!recover(&scene.pair).await);
    scene.assert_untouched("kept at the source").await;
    scene.finish().await;
}

async fn the_operator_leaves_it_to_the_destination(engine: Engine) {
    let scene = Scene::set(engine, Lab::builder(2)).await;
    let [h1, h2] = [scene.pair.host(1), scene.pair.host(2)];
    let wan = scene.pair.lab().wan();

    // Not when it says that there is nothing.
    let attempt = scene.start_up_to(Phase::Freeze).await;
    attempt.kill().await;
    scene.go_on(Phase::Freeze).await;
    let leave = ["livemig", "--json", "recover", "--keep", "destination"];
    let refused = h1.try_exec(&leave).await;
    assert_code(&refused, 3);
    assert!(refused.to_string().contains("not-there"), "{refused}");
    assert!(!recover(&scene.pair).await);
    scene.assert_untouched("nothing to keep there").await;

    in_doubt(&scene).await;
    scene.go_on(Phase::Restore).await;
    while h2.container_state("web").await.as_deref() != Some("running") {
        tokio::time::sleep(lab::LOOK).await;
    }
    link::cut(wan).await;
    assert_code(&h1.try_exec(&leave).await, 6);
    assert_eq!(h1.container_state("web").await, None);
    link::mend(wan).await;
    assert!(recover(&scene.pair).await);
    assert_eq!(h2.container_state("web").await.as_deref(), Some("running"));
    scene.end(2).await;
}
