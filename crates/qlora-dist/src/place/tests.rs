//! Environments of launchers as they are, and as they must not be.

#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

/// The place in an environment that is written as `A=1 B=2`.
fn find(text: &str) -> Result<Place, DistError> {
    let vars: Vec<(String, String)> =
        text.split_whitespace().map(|pair| pair.split_once('=').unwrap()).map(|(a, b)| (a.into(), b.into())).collect();
    Place::find(&|name| vars.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone()))
}

fn place(text: &str) -> Place {
    find(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

const TORCHRUN: &str =
    "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=n1 MASTER_PORT=29400 TORCHELASTIC_RUN_ID=none";
const SLURM: &str = "SLURM_JOB_ID=4711 SLURM_STEP_ID=2 SLURM_PROCID=5 SLURM_LOCALID=1 SLURM_NTASKS=6 SLURM_NODEID=2 \
    SLURM_STEP_TASKS_PER_NODE=2(x3) SLURM_JOB_NODELIST=node[08-10]";
const OPEN_MPI: &str = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 \
    OMPI_COMM_WORLD_LOCAL_SIZE=2 PMIX_NAMESPACE=1234@0";

#[test]
fn launchers_say_where_a_process_stands() {
    let of = |place: &Place| (place.rank, place.world_size, place.local_rank, place.local_world_size);
    let torchrun = place(TORCHRUN);
    assert_eq!((of(&torchrun), torchrun.launcher), ((3, 8, 1, 2), Launcher::Torchrun));
    assert_eq!((torchrun.address().as_str(), torchrun.run.as_str()), ("n1:29400", "none"));

    let kubeflow =
        place("PET_NNODES=4 PET_NODE_RANK=2 PET_NPROC_PER_NODE=1 PET_MASTER_ADDR=job-0 PET_MASTER_PORT=29500");
    assert_eq!((of(&kubeflow), kubeflow.launcher), ((2, 4, 0, 1), Launcher::Kubeflow));
    assert_eq!(kubeflow.address(), "job-0:29500");

    let slurm = place(SLURM);
    assert_eq!((of(&slurm), slurm.launcher), ((5, 6, 1, 2), Launcher::Slurm));
    // 20000 + 4711 * 7 + 2, modulo 12000.
    assert_eq!((slurm.address().as_str(), slurm.run.as_str()), ("node08:28979", "job 4711, step 2"));

    let mpi = place(OPEN_MPI);
    assert_eq!((of(&mpi), mpi.launcher), ((1, 2, 1, 2), Launcher::OpenMpi));
    assert_eq!(mpi.master_addr, "127.0.0.1");
    let other_run = place(&OPEN_MPI.replace("1234@0", "1235@0"));
    assert!(mpi.master_port != other_run.master_port, "two runs on one host need two ports");

    let pmi = place("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2");
    assert_eq!((of(&pmi), pmi.launcher, pmi.address().as_str()), ((1, 2, 1, 2), Launcher::Pmi, "127.0.0.1:29500"));
}

#[test]
fn what_starts_a_process_last_counts() {
    assert_eq!(place(&format!("{SLURM} {TORCHRUN}")).launcher, Launcher::Torchrun);
    assert_eq!(place(&format!("{SLURM} {OPEN_MPI}")).launcher, Launcher::OpenMpi);
    assert_eq!(place(&format!("{SLURM} PMI_RANK=0 PMI_SIZE=6")).launcher, Launcher::Slurm);
    let given = place(&format!("{SLURM} MASTER_ADDR=fe80::1 MASTER_PORT=1234"));
    assert_eq!(given.address(), "[fe80::1]:1234");
    let agent = place(&format!("{TORCHRUN} TORCHELASTIC_USE_AGENT_STORE=True"));
    assert!(agent.master_port != 29400 && agent.master_addr == "n1", "torchrun has the port itself: {agent:?}");
    // Those that a parent sets for its children reach them as they were.
    let child = Place { launcher: Launcher::Qlora, run: "7-8".into(), ..place(TORCHRUN) };
    let env: Vec<String> = child.to_env().iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(place(&format!("{SLURM} TORCHELASTIC_USE_AGENT_STORE=True {}", env.join(" "))), child);
}

#[test]
fn one_process_is_alone_whoever_started_it() {
    for text in [
        "",
        "HOME=/root SLURM_JOB_ID=7 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_JOB_NODELIST=login",
        // A batch script has its job's variables, and is no task of it.
        "SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_NODELIST=n[1-4]",
        "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_NTASKS=1 SLURM_PROCID=0",
        "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=0",
        "RANK=0 WORLD_SIZE=1",
        "PET_NNODES=1",
        "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1",
        "PMI_RANK=0 PMI_SIZE=1",
        "RANK= WORLD_SIZE=",
    ] {
        let place = place(text);
        assert!(place.is_alone() && place.is_first() && place.local_rank == 0, "{text}: {place:?}");
    }
}

#[test]
fn contradictions_name_the_variable() {
    let swap = |text: &str, from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    for (text, words) in [
        (swap(TORCHRUN, "RANK=3 ", "RANK=8 "), "RANK = \"8\" in the environment: ranks go from 0 to below WORLD_SIZE"),
        (swap(TORCHRUN, "RANK=3 ", ""), "RANK is not set, and WORLD_SIZE is"),
        (swap(TORCHRUN, "WORLD_SIZE=8 ", ""), "WORLD_SIZE is not set, and RANK is"),
        (swap(TORCHRUN, "RANK=3", "RANK=three"), "RANK = \"three\""),
        (swap(TORCHRUN, "MASTER_ADDR=n1", "X=1"), "MASTER_ADDR is not set, and WORLD_SIZE is 8"),
        (swap(TORCHRUN, "MASTER_PORT=29400", "X=1"), "MASTER_PORT is not set"),
        (swap(TORCHRUN, "29400", "0"), "MASTER_PORT = \"0\""),
        (swap(TORCHRUN, "29400", "70000"), "MASTER_PORT = \"70000\""),
        (swap(TORCHRUN, "LOCAL_RANK=1", "LOCAL_RANK=2"), "LOCAL_RANK = \"2\""),
        (swap(TORCHRUN, "LOCAL_WORLD_SIZE=2", "LOCAL_WORLD_SIZE=9"), "LOCAL_WORLD_SIZE = \"9\""),
        (swap(SLURM, "SLURM_PROCID=5", "SLURM_PROCID=6"), "SLURM_PROCID = \"6\""),
        (swap(SLURM, "node[08-10]", "node[08"), "SLURM_JOB_NODELIST = \"node[08\""),
        (swap(SLURM, "SLURM_JOB_NODELIST=node[08-10]", ""), "SLURM_JOB_NODELIST is not set, and SLURM_NTASKS is 6"),
        (swap(SLURM, "2(x3)", "1(x3)"), "SLURM_STEP_TASKS_PER_NODE = \"1(x3)\""),
        (swap(SLURM, "SLURM_JOB_ID=4711", "SLURM_JOB_ID=x"), "SLURM_JOB_ID = \"x\""),
        (swap(OPEN_MPI, "LOCAL_SIZE=2", "LOCAL_SIZE=1"), "OMPI_COMM_WORLD_LOCAL_RANK = \"1\""),
        (
            swap(&swap(OPEN_MPI, "LOCAL_SIZE=2", "LOCAL_SIZE=1"), "LOCAL_RANK=1", "LOCAL_RANK=0"),
            "MASTER_ADDR is not set, and Open MPI's 2 ranks are on several hosts",
        ),
        ("OMPI_COMM_WORLD_RANK=1".into(), "OMPI_COMM_WORLD_SIZE is not set, and OMPI_COMM_WORLD_RANK is"),
        ("PMI_RANK=1".into(), "PMI_SIZE is not set, and PMI_RANK is"),
        ("PMI_RANK=1 PMI_SIZE=4".into(), "MASTER_ADDR is not set, and PMI"),
        ("PET_NNODES=2 PET_NODE_RANK=0 PET_NPROC_PER_NODE=8".into(), "PET_NPROC_PER_NODE = \"8\""),
        ("PET_NNODES=2 PET_NODE_RANK=0".into(), "PET_MASTER_ADDR is not set"),
        ("RANK=0 WORLD_SIZE=99999999999999999999".into(), "WORLD_SIZE = \"9999"),
    ] {
        let message = find(&text).expect_err(&text).to_string();
        assert!(message.contains(words), "{text}: {message}");
    }
}

proptest! {
    /// Whatever stands in the environment: a place whose numbers fit each other, or an error.
    #[test]
    fn no_environment_gives_an_impossible_place(values in prop::collection::vec("[0-9]{0,3}|[a-z0-9\\[\\](),-]{0,12}", 24)) {
        const NAMES: [&str; 24] = [
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES", "PET_NODE_RANK",
            "PET_NPROC_PER_NODE", "PET_MASTER_ADDR", "PET_MASTER_PORT", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_NTASKS",
            "SLURM_LOCALID", "SLURM_NODEID", "SLURM_TASKS_PER_NODE", "SLURM_JOB_NODELIST", "SLURM_JOB_ID", "PMI_SIZE",
        ];
        // From each launcher on: those before it would hide it.
        for first in [0, 6, 11, 15, 23] {
            let lookup = |name: &str| NAMES.iter().position(|other| *other == name).filter(|at| *at >= first).map(|at| values[at].clone());
            if let Ok(place) = Place::find(&lookup) {
                prop_assert!(place.rank < place.world_size && place.local_rank < place.local_world_size);
                prop_assert!(place.local_world_size <= place.world_size && place.master_port > 0);
            }
        }
    }
}
