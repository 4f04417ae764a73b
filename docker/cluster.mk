# Included by the top Makefile. DEBIAN_RELEASE=… and COMPOSE_PROJECT_NAME=… go through to docker/cluster.

.PHONY: cluster-build cluster-up cluster-env cluster-down cluster-shell cluster-logs

cluster-build: ## build the image of the local Slurm cluster
	docker/cluster build

cluster-up: ## start a Slurm cluster of four nodes in Docker (DEBIAN_RELEASE=bookworm|trixie|sid)
	docker/cluster up

cluster-env: ## make or refresh the cluster's Python environment
	docker/cluster env

cluster-down: ## stop the cluster and remove all it made, except the image
	docker/cluster down

cluster-shell: ## a shell on the cluster's login node
	docker/cluster shell

cluster-logs: ## what the cluster's daemons logged
	docker/cluster logs
