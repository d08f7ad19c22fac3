"""The fields of a JobSet, jobset.x-k8s.io/v1alpha2, as its API definition lists them (kubernetes-sigs/jobset, the swagger file of its Python
SDK). The Job and pod inside are Kubernetes' own, for which the package kubernetes-validate has the real schemas."""


def _object(required: str, **properties) -> dict:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": properties}


def _list(items: dict) -> dict:
    return {"type": "array", "items": items}


STRING, INT, BOOL = {"type": "string"}, {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}, {"type": "boolean"}
RULE = _object(
    "name action",
    name=STRING | {"pattern": r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"]},
    onJobFailureReasons=_list(
        {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]}
    ),
    onJobFailureMessagePatterns=_list(STRING),
    targetReplicatedJobs=_list(STRING),
)
JOB = _object(
    "name template",
    name=STRING,
    groupName=STRING,
    replicas=INT,
    dependsOn=_list(_object("name status", name=STRING, status=STRING)),
    template={"type": "object"},
)
SPEC = _object(
    "",
    coordinator=_object("replicatedJob", replicatedJob=STRING, jobIndex=INT, podIndex=INT),
    failurePolicy=_object("", maxRestarts=INT, restartStrategy=STRING, rules=_list(RULE)),
    managedBy=STRING,
    network=_object("", enableDNSHostnames=BOOL, publishNotReadyAddresses=BOOL, subdomain=STRING),
    replicatedJobs=_list(JOB),
    startupPolicy=_object("startupPolicyOrder", startupPolicyOrder=STRING),
    successPolicy=_object("operator", operator=STRING, targetReplicatedJobs=_list(STRING)),
    suspend=BOOL,
    ttlSecondsAfterFinished=INT,
    volumeClaimPolicies=_list({"type": "object"}),
)
JOBSET = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object", "required": ["name"]},
    spec=SPEC,
)
